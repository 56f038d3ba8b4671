"""The Debian package, for the Debian it is built on: `make deb`.

    python packaging/deb.py WHEEL FOLDER

Debian 12 has neither msgspec nor a numpy that is new enough, so the package brings all Python that samepage needs, in
/usr/lib/samepage, for the Python of that Debian. Programs of your own that `import samepage` need the wheel.
"""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"

LAUNCHER = f"""#!/usr/bin/python{PYTHON}
import sys
sys.path.insert(0, "/usr/lib/samepage")
from samepage.commands import main
sys.exit(main())
"""

CONTROL = """Package: samepage
Version: {version}
Architecture: amd64
Maintainer: the samepage developers <samepage@localhost>
Section: admin
Priority: optional
Depends: python{python}, libc6 (>= {libc})
Recommends: {fuse}, fuse3, libjansson4
Suggests: bash-completion
Installed-Size: {size}
Description: same-page merging in user space
 Finds pages of identical content in running processes and makes them share one
 copy, copy-on-write, as the kernel's KSM does, without ksmd, without root for
 the processes it serves, and without an unmerge that ends in the OOM killer.
"""

POSTINST = """#!/bin/sh
set -e
if [ "$1" = configure ] && [ -d /run/systemd/system ]; then
	systemctl daemon-reload
	if [ -n "$2" ]; then systemctl try-restart samepage.service; fi
fi
"""

PRERM = """#!/bin/sh
set -e
if [ "$1" = remove ] && [ -d /run/systemd/system ]; then
	systemctl disable --now samepage.service samepage.socket || true
fi
"""

POSTRM = """#!/bin/sh
set -e
if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
"""


def stage(wheel: Path, root: Path) -> None:
    """All files, where they will be."""
    library = root / "usr/lib/samepage"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--target", library]
    subprocess.run([*pip, f"{wheel}[metrics,top]"], check=True)
    shutil.rmtree(library / "bin", ignore_errors=True)
    for tests in library.glob("numpy/**/tests"):
        shutil.rmtree(tests)
    put(root / "usr/bin/samepage", LAUNCHER, 0o755)
    for unit in ("samepage.service", "samepage.socket"):
        put(root / "usr/lib/systemd/system" / unit, (HERE / "systemd" / unit).read_text())
    put(root / "etc/default/samepage", (HERE / "systemd/default").read_text())
    put(root / "usr/share/doc/samepage/copyright", "Apache-2.0: /usr/share/common-licenses/Apache-2.0\n")
    put(root / "usr/share/doc/samepage/changelog", (HERE.parent / "CHANGELOG.md").read_text())
    made = root.parent / "manual"
    subprocess.run([sys.executable, HERE / "manual.py", made], check=True)
    for page in (made / "man1").iterdir():
        put(root / "usr/share/man/man1" / f"{page.name}.gz", gzip.compress(page.read_bytes(), mtime=0))
    put(root / "usr/share/bash-completion/completions/samepage", (made / "samepage.bash").read_text())
    put(root / "usr/share/zsh/vendor-completions/_samepage", (made / "_samepage").read_text())
    put(root / "usr/share/fish/vendor_completions.d/samepage.fish", (made / "samepage.fish").read_text())


def put(path: Path, content: str | bytes, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)


def fuse(root: Path) -> str:
    """The package of the FUSE library that the server of KSM's files was linked with."""
    server = root / "usr/lib/samepage/samepage/samepage-sysfs"
    if not server.exists():
        return "libfuse3-3"
    needed = subprocess.run(["readelf", "--dynamic", server], check=True, capture_output=True, text=True).stdout
    return "libfuse3-4" if "libfuse3.so.4" in needed else "libfuse3-3"


def libc() -> str:
    return os.confstr("CS_GNU_LIBC_VERSION").split()[1]  # type: ignore[union-attr]


def version(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = archive.read(metadata).decode().splitlines()
    return next(line.split(": ")[1] for line in lines if line.startswith("Version: "))


def main() -> None:
    wheel, folder = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    root = folder / "root"
    shutil.rmtree(root, ignore_errors=True)
    stage(wheel, root)
    size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) // 1024
    facts = {"version": version(wheel), "python": PYTHON, "libc": libc(), "fuse": fuse(root), "size": size}
    put(root / "DEBIAN/control", CONTROL.format(**facts))
    put(root / "DEBIAN/conffiles", "/etc/default/samepage\n")
    for name, script in (("postinst", POSTINST), ("prerm", PRERM), ("postrm", POSTRM)):
        put(root / "DEBIAN" / name, script, 0o755)
    for path in [root, *root.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)
    package = folder / f"samepage_{facts['version']}_amd64.deb"
    command = ["dpkg-deb", "--root-owner-group", "-Zxz", "-z1", "--build", root, package]
    subprocess.run(command, check=True)
    print(package)


if __name__ == "__main__":
    main()
