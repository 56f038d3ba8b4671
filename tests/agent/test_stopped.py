"""Whoever stops a process finds every page of it in its place, at whatever moment of merging that was."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from samepage.memory import AREA, EXTENT, AddressSpaceGone, PageStatus
from tests.agent.asked import HUGE, Process
from tests.agent.preload import ROOT, Preload, compile_c

PAGES = 4 * HUGE


@pytest.fixture(scope="module")
def stopper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_c(ROOT / "tests" / "agent" / "stopper.c", tmp_path_factory.mktemp("stopper") / "stopper")


@pytest.fixture(params=["MADV_NOHUGEPAGE", "MADV_HUGEPAGE"])
def process(request: pytest.FixtureRequest, preload: Preload, tmp_path: Path) -> Iterator[Process]:
    made = Process(preload, tmp_path, advice=request.param)
    yield made
    made.end()


def extents_of(first: int, status: np.ndarray, scattered: bool) -> np.ndarray:
    pages = np.flatnonzero(status == PageStatus.DONE)
    if scattered:  # a piece each
        pages, offsets = pages[::2], np.arange(len(pages))[::2]
        return np.array([(first + page, 1, at) for page, at in zip(pages, offsets, strict=True)], EXTENT)
    return np.array([(first, len(pages), 0)], EXTENT)


def stop_and_look(process: Process, stopper: Path, how: str, rounds: int, *more: str) -> list[int]:
    """Merge and unmerge all pages without end, and let them be looked at: read, unread, wrong, rounds with such."""
    process.insist()
    first = process.address // 4096
    area = np.array([(first, PAGES)], AREA)
    command = [str(stopper), str(process.process.pid), str(process.address), str(PAGES), str(rounds), how, *more]
    merged = turn = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        while running.poll() is None:
            donation = process.space.donate(area)
            assert donation.segment is not None
            if (donation.status == PageStatus.DONE).all() or turn % 2:
                extents = extents_of(first, donation.status, bool(turn % 2))
                status = process.space.merge(donation.segment, extents).status
                merged += int((status == PageStatus.DONE).sum())
            process.space.break_ksm(first, PAGES)
            donation.segment.close()
            turn += 1
        found = [int(word) for word in running.stdout.read().split()]
    assert running.returncode == 0
    assert merged > PAGES
    print(how, "pages read, unread, wrong, rounds:", found, "merged:", merged)
    assert process.tell("check") == "0\n"
    return found


def children_of(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


@pytest.mark.parametrize("advice", ["MADV_NOHUGEPAGE", "MADV_HUGEPAGE"])
def test_a_step_that_is_killed_in_the_middle_is_finished(preload: Preload, tmp_path: Path, advice: str) -> None:
    """By somebody who kills a process that he does not know."""
    killed = 0
    for turn in range(20):
        folder = tmp_path / str(turn)
        folder.mkdir()
        process = Process(preload, folder, advice=advice)
        first = process.address // 4096
        found: list[BaseException] = []

        def merge(process: Process = process, first: int = first, found: list[BaseException] = found) -> None:
            with contextlib.suppress(AddressSpaceGone, OSError):
                while True:
                    donation = process.space.donate(np.array([(first, PAGES)], AREA))
                    assert donation.segment is not None
                    with contextlib.closing(donation.segment):
                        process.space.merge(donation.segment, extents_of(first, donation.status, False))
                    process.space.break_ksm(first, PAGES)

        merging = threading.Thread(target=merge)
        merging.start()
        time.sleep(turn / 1000)
        deadline = time.monotonic() + 10
        while not (children := children_of(process.process.pid)) and time.monotonic() < deadline:
            pass
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
                killed += 1
        time.sleep(0.02)
        assert process.tell("check") == "0\n"
        process.space.close()
        merging.join()
        process.end()
    assert killed > 10


def state_of(pid: int) -> str:
    """R, S, T...; "" if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def stop_a_step(process: Process) -> int:
    """Stop a child that makes a step, in the middle of it: its number."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for child in children_of(process.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGSTOP)
                time.sleep(0.05)
                if state_of(child) == "T" and Path(f"/proc/{child}/timers").read_text():
                    return child
                os.kill(child, signal.SIGCONT)
    raise AssertionError("no step was met")


def test_a_step_that_does_not_come_to_its_end_is_given_up_after_ten_seconds(preload: Preload, tmp_path: Path) -> None:
    """Here it is stopped for good; a kernel that does not come back from a call is as bad (see unstopped.c). The
    process goes on and has its bytes, and its agent ends."""
    process = Process(preload, tmp_path, advice="MADV_NOHUGEPAGE")
    process.insist()
    first = process.address // 4096
    gone, enough = threading.Event(), threading.Event()

    def merge() -> None:
        try:
            while not enough.is_set():
                donation = process.space.donate(np.array([(first, PAGES)], AREA))
                assert donation.segment is not None
                with contextlib.closing(donation.segment):
                    process.space.merge(donation.segment, extents_of(first, donation.status, False))
                process.space.break_ksm(first, PAGES)
        except (AddressSpaceGone, OSError):
            gone.set()

    merging = threading.Thread(target=merge)
    merging.start()
    try:
        child = stop_a_step(process)
    except BaseException:
        enough.set()
        raise
    began = time.monotonic()
    while state_of(child) and time.monotonic() < began + 30:
        time.sleep(0.1)
    took, left = time.monotonic() - began, state_of(child)
    if left:
        os.kill(child, signal.SIGKILL)
    assert not left, "the step is stopped, and the program waits for the pages that are out of their places"
    assert took > 5, "no step takes that long, but a slow machine's may take seconds"
    assert process.tell("check") == "0\n"
    assert gone.wait(30)
    merging.join()
    process.end()


@pytest.mark.parametrize("how", ["signal", "trace"])
def test_a_stopped_process_has_all_its_pages(process: Process, stopper: Path, how: str) -> None:
    rounds = int(os.environ.get("SAMEPAGE_TEST_STOPS", "150"))
    looked, unread, wrong, _ = stop_and_look(process, stopper, how, rounds)
    assert looked == rounds * PAGES
    assert (unread, wrong) == (0, 0)


def freezers() -> dict[str, Path]:
    """Where cgroups can be frozen: by version, the root of a hierarchy."""
    found = {}
    for line in Path("/proc/mounts").read_text().splitlines():
        _, point, kind, options, *_ = line.split()
        if kind == "cgroup" and "freezer" in options.split(","):
            found["v1"] = Path(point)
        elif kind == "cgroup2":
            found["v2"] = Path(point)
    return found


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_frozen_process_has_all_its_pages_when_it_goes_on(process: Process, stopper: Path, version: str) -> None:
    root = freezers().get(version)
    if os.geteuid() != 0 or root is None:
        pytest.skip("needs root and a freezer of this version")
    group = root / f"samepage-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "cgroup.procs").write_text(str(process.process.pid))
        rounds = int(os.environ.get("SAMEPAGE_TEST_STOPS", "150"))
        looked, unread, wrong, _ = stop_and_look(process, stopper, "freeze", rounds, str(group))
    finally:
        if version == "v1":
            (group / "freezer.state").write_text("THAWED")
        else:
            (group / "cgroup.freeze").write_text("0")
        (root / "cgroup.procs").write_text(str(process.process.pid))
        group.rmdir()
    assert looked == rounds * PAGES
    assert wrong == 0
    assert unread < looked / 100  # the freezer stops anything anywhere: see the README's limits
