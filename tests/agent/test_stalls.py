"""How long threads of a program were held up is counted: by the agent, which tells of it with the next look."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from samepage.memory import AREA, EXTENT, NO_STALLS, PageStatus, Stalls
from samepage.memory.wire import Flags, Swap
from tests.agent.asked import Process
from tests.agent.preload import Preload

PAGES = 2048
TRIES = 100

PROGRAM = f"""
import ctypes, mmap, sys, threading
n = {PAGES} * 4096
area = mmap.mmap(-1, n, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.madvise(mmap.MADV_NOHUGEPAGE)
for page in range(0, n, 4096):
    area[page : page + 8] = page.to_bytes(8, "little")
area.madvise(mmap.MADV_MERGEABLE)
def read():
    while busy:
        for page in range(0, n, 4096):
            area[page]
def write():
    while busy:
        for page in range(0, n, 4096):
            area[page] ^= 0
def map():
    while busy:
        mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
print(ctypes.addressof(ctypes.c_char.from_buffer(area)), flush=True)
for line in sys.stdin:
    name = line.strip()
    busy = name != "rest"
    if busy:
        thread = threading.Thread(target=globals()[name], daemon=True)
        thread.start()
    else:
        thread.join()
    print("now", flush=True)
"""

Start = Callable[..., Process]


@pytest.fixture
def start(preload: Preload, tmp_path: Path) -> Iterator[Start]:
    made: list[Process] = []

    def start(flags: int = 0) -> Process:
        made.append(Process(preload, tmp_path, PROGRAM, flags=flags))
        return made[-1]

    yield start
    for process in made:
        process.end()


def taken(process: Process) -> Stalls:
    """What was counted since the last look."""
    return process.space.scan(0, 1).stalls


def merge(process: Process) -> float:
    """Have it merge all its pages with copies of them, and break that again: how many seconds that took."""
    began, first = time.monotonic(), process.address // 4096
    donation = process.space.donate(np.array([(first, PAGES)], AREA))
    assert (donation.status == PageStatus.DONE).all()
    process.space.merge(donation.segment, np.array([(first, PAGES, 0)], EXTENT))
    donation.close()
    process.space.break_ksm(first, PAGES)
    return time.monotonic() - began


def merge_until_counted(process: Process) -> None:
    """No thread was ever held up for longer than pages were swapped."""
    taken(process)
    for _ in range(TRIES):
        took = merge(process)
        found = taken(process)
        assert found.ns <= took * 1e9
        if sum(found.counts):
            assert found.ns
            return
    raise AssertionError("nobody was held up")


def test_who_reads_a_page_that_is_being_moved_is_counted(start: Start) -> None:
    process = start()
    if process.space.swap != Swap.MOVE:
        pytest.skip("this kernel does not move pages")
    process.tell("read")
    merge_until_counted(process)


def test_who_writes_to_a_page_that_is_write_protected_is_counted(start: Start) -> None:
    process = start(Flags.SWAP_WP)
    if process.space.swap != Swap.WP:
        pytest.skip("no write-protection here")
    process.tell("write")
    merge_until_counted(process)


def test_who_waits_for_the_agents_lock_is_counted(start: Start) -> None:
    process = start()
    process.tell("map")
    merge_until_counted(process)


def test_nothing_is_counted_of_a_program_that_is_not_held_up_and_nothing_twice(start: Start) -> None:
    process = start()
    taken(process)
    merge(process)
    assert taken(process) == NO_STALLS
    process.tell("read")
    merge(process)
    process.tell("rest")
    taken(process)
    assert taken(process) == NO_STALLS
