"""The main job and the promise on other kernels, in a virtual machine."""

from __future__ import annotations

import pytest

from tests.kernels.__main__ import FOLDER, VERSIONS, check, is_well
from tests.kernels.archive import Archive
from tests.kernels.boot import available, emulator

SHORT = ["main job", "memory.max"]


def run(version: str, way: str, checks: list[str], minutes: float) -> None:
    if missing := available():
        pytest.skip(f"{missing} is missing")
    FOLDER.mkdir(parents=True, exist_ok=True)
    archive = Archive(FOLDER)
    package = archive.newest(version)
    if not package:
        pytest.skip(f"no package of Linux {version or 'of any version'} is to be had here")
    (row,) = check(archive, emulator(archive), package, (way,), checks, minutes * 60).values()
    assert row
    assert all(is_well(outcome) for outcome in row.values()), row


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("way", ["move", "wp"])
def test_all_is_well_or_left_alone(version: str, way: str) -> None:
    run(version, way, [], 40)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_on_debians_kernel_programs_are_merged_and_the_promise_holds_in_a_cgroup_of_version_2() -> None:
    run("6.1", "wp", SHORT, 50)
