"""The main job and the promise on other kernels, in a virtual machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.__main__ import FOLDER, VERSIONS, check, understood
from tests.kernels.archive import Archive
from tests.kernels.boot import available, emulator, unpack
from tests.kernels.network import PAGES, READER
from tests.kernels.table import DOCUMENT, RESULTS, is_well, written

SHORT = ["main job", "memory.max"]


def run(version: str, way: str, checks: list[str], minutes: float) -> None:
    if missing := available():
        pytest.skip(f"{missing} is missing")
    FOLDER.mkdir(parents=True, exist_ok=True)
    archive = Archive(FOLDER)
    package = archive.newest(version)
    if not package:
        pytest.skip(f"no package of Linux {version or 'of any version'} is to be had here")
    try:
        unpack(archive, package, FOLDER / Path(package).name)
    except OSError as e:
        pytest.skip(f"Linux {version} cannot be fetched: {e}")
    (row,) = check(archive, emulator(archive), package, (way,), checks, minutes * 60).values()
    assert row["checks"]
    assert all(is_well(outcome) for outcome in row["checks"].values()), row


@pytest.mark.timeout(900)
def test_on_debians_kernel_programs_are_merged_and_the_promise_holds_in_a_cgroup_of_version_2() -> None:
    """A minute and a half, where QEMU is installed."""
    run("6.1", "wp", SHORT, 13)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("version", [version for version in VERSIONS if version != "here"])
@pytest.mark.parametrize("way", ["move", "wp"])
def test_all_is_well_or_left_alone(version: str, way: str) -> None:
    run(version, way, [], 40)


def test_what_a_console_shows_before_it_does_not_hide_how_slow_the_machine_is() -> None:
    row = understood(0, 'Booting from ROM..\x1b[0m.9.3 times as slow\nSAID {"emulator": "ok"}\n', 1.0)
    assert (row["slow"], row["checks"]) == (9.3, {"emulator": "ok"})


def test_all_that_a_server_fills_and_as_much_besides_is_in_one_huge_pages_range(tmp_path: Path) -> None:
    """Else the number of pages that are left beside those depends on where the kernel puts them."""
    file = tmp_path / "file"
    file.write_bytes(bytes(4096))
    for _ in range(20):
        done = subprocess.run([sys.executable, "-c", READER, str(file)], stdin=subprocess.DEVNULL, capture_output=True)
        assert int(done.stdout) % (2 << 20) == 0
    assert PAGES <= 512


def test_the_table_in_the_documentation_is_what_was_found() -> None:
    """`python -m tests.kernels.table` writes it."""
    document = DOCUMENT.read_text()
    assert document == written(document, json.loads(RESULTS.read_text()))
