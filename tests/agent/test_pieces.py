"""A program that needs the mappings which merging took gets them back."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.processes import wait_until
from samepage.memory import AREA, EXTENT, PageStatus
from samepage.memory.agent import DONATE_MAX
from tests.agent.asked import Process
from tests.agent.preload import Preload, compile_c

PAGES = 40_000
MOST = int(Path("/proc/sys/vm/max_map_count").read_text())

pytestmark = pytest.mark.skipif(not 60_000 < MOST < 80_000, reason="needs vm.max_map_count to be what it mostly is")


def merge_every_other(process: Process) -> None:
    first = process.address // 4096
    process.scan(1 << 20)
    for start in range(1, PAGES, 2 * DONATE_MAX):
        singles = np.arange(first + start, min(first + PAGES, first + start + 2 * DONATE_MAX), 2)
        donation = process.space.donate(np.array([(page, 1) for page in singles], AREA))
        assert donation.segment is not None
        extents = np.array([(page, 1, at) for at, page in enumerate(singles)], EXTENT)
        assert (process.space.merge(donation.segment, extents).status == PageStatus.DONE).all()
        donation.segment.close()


@pytest.fixture
def process(preload: Preload, tmp_path: Path) -> Iterator[Process]:
    program = compile_c(Path(__file__).parent / "pieces.c", tmp_path / "pieces", "-O1", "-pthread")
    process = Process(preload, tmp_path, command=[str(program)])
    merge_every_other(process)
    yield process
    process.end()


def test_a_program_has_40_000_mappings_more_after_20_000_pages_were_merged(process: Process) -> None:
    """Each piece takes two. Meanwhile its threads see every byte in its place."""
    assert process.space.map_count()[0] > PAGES
    assert process.tell(20_000) == "pieces 20000 , wrong 0\n"
    # Four of the program's took seven mappings, which it gave back. Seen twice in long runs: 42,507 right afterwards.
    wait_until(lambda: process.space.map_count()[0] < MOST - 20_000 // 4 * 7 + 100, "fewer mappings than before", 10)


def test_what_is_not_needed_stays_merged(process: Process) -> None:
    before = process.space.map_count()[0]
    pieces = (MOST - before) // 2 - 500
    assert process.tell(pieces) == f"pieces {pieces} , wrong 0\n"
    assert process.space.map_count()[0] >= before - 1000  # some were written


def test_whoever_kills_the_child_that_does_it_harms_nothing(process: Process) -> None:
    over = threading.Event()
    killed = 0

    def kill() -> None:
        nonlocal killed
        children = Path(f"/proc/{process.process.pid}/task")
        while not over.is_set():
            for task in children.iterdir():
                with contextlib.suppress(OSError):
                    for child in (task / "children").read_text().split():
                        os.kill(int(child), signal.SIGKILL)
                        killed += 1

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        assert process.tell(20_000).endswith("wrong 0\n")
    finally:
        over.set()
        thread.join()
    assert killed
