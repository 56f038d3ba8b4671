"""What a look says of memory that was merged and is something else by now."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from samepage.memory import AREA, EXTENT, PageStatus, RunKind, ScanFlag
from tests.agent.asked import HUGE, Process
from tests.agent.preload import Preload

PAGES = 1200
"""More than are hashed in one step."""

NOTHING: dict[RunKind, list[int]] = {kind: [] for kind in RunKind}

SYS_CLONE, SIGCHLD = 56 if platform.machine() == "x86_64" else 220, 17

PROGRAM = f"""
import ctypes, mmap, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
n = {PAGES} << 12
def map_at(address, flags):
    return libc.mmap(ctypes.c_void_p(address), ctypes.c_size_t(n), 3, 0x22 | flags, -1, ctypes.c_long(0))
def fill(value, first, pages):
    for page in range(first, first + pages):
        ctypes.memset(address + (page << 12), value + page % 100, 4096)
def advise(advice):
    return libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(n), advice)
address = map_at(0, 0)
advise(15)  # MADV_NOHUGEPAGE: what is written later stands alone
fill(1, 0, {PAGES})
advise(12)  # MADV_MERGEABLE
print(address, flush=True)
for line in sys.stdin:
    how = line.split()
    if how[0] in ("fork", "_Fork", "syscall"):
        if getattr(libc, how[0])({SYS_CLONE}, {SIGCHLD}, 0, 0, 0, 0) == 0:
            libc._exit(0)
        print("forked", flush=True)
        continue
    if how[0] == "stay":
        child = libc.fork()
        if child == 0:
            libc.pause()
        print("forked", flush=True)
        continue
    if how[0] == "leave":
        libc.kill(child, 9)
        libc.waitpid(child, None, 0)
        print("left", flush=True)
        continue
    if how[0] == "fill":
        fill(*map(int, how[1:]))
        print("filled", flush=True)
        continue
    if how[0] == "second":
        first, address = address, map_at(0, 0)
        advise(15)
        fill(7, 0, {PAGES})
        advise(12)
        print(address, flush=True)
        continue
    if how[0] == "over":
        libc.mremap.restype = ctypes.c_void_p
        n = ctypes.c_size_t(n)  # MREMAP_MAYMOVE | MREMAP_FIXED
        assert libc.mremap(ctypes.c_void_p(address), n, n, 3, ctypes.c_void_p(first)) == first
        print("moved", flush=True)
        continue
    if how[0] == "map":
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(n))
        assert map_at(address, 0x100000) == address  # MAP_FIXED_NOREPLACE
        advise(15)
    elif how[0] == "withdraw":
        assert advise(13) == 0  # MADV_UNMERGEABLE
    else:
        assert advise(4) == 0  # MADV_DONTNEED
    fill(100, *map(int, how[1:]))
    advise(12)
    print("done", flush=True)
"""


@pytest.fixture
def process(preload: Preload, tmp_path: Path) -> Iterator[Process]:
    made = Process(preload, tmp_path, PROGRAM)
    yield made
    made.end()


def merge(process: Process, address: int) -> int:
    """Merge all of an area; returns the number of its segment."""
    donation = process.space.donate(np.array([(address // 4096, PAGES)], AREA))
    assert donation.segment is not None
    result = process.space.merge(donation.segment, np.array([(address // 4096, PAGES, 0)], EXTENT))
    assert (result.status == PageStatus.DONE).all()
    return donation.segment.ino


def look(process: Process, budget: int) -> dict[RunKind, list[int]]:
    """One look at everything, so many pages at a time: pages by kind, each as often as it was told."""
    said: dict[RunKind, list[int]] = {kind: [] for kind in RunKind}
    for found in process.look(budget):
        for run in found.runs:
            at = int(run["vpn"]) - process.address // 4096
            said[RunKind(run["kind"])] += range(at, at + int(run["npages"]))
    return said


@pytest.mark.parametrize("budget", [1 << 20, 100])
@pytest.mark.parametrize("how", ["map", "withdraw", "discard"])
def test_that_merged_pages_are_gone_and_what_is_there_instead_is_said_in_one_look(
    process: Process, how: str, budget: int
) -> None:
    merge(process, process.address)
    assert look(process, budget) == NOTHING
    assert process.tell(f"{how} 100 1000") == "done\n"
    there = list(range(PAGES) if how == "withdraw" else range(100, 1100))
    assert look(process, budget) == NOTHING | {RunKind.GONE: list(range(PAGES)), RunKind.HASHED: there}
    assert look(process, budget) == NOTHING


@pytest.mark.parametrize("advice", ["MADV_HUGEPAGE", "MADV_NOHUGEPAGE"])
def test_a_look_stops_where_it_is_to_stop(preload: Preload, tmp_path: Path, advice: str) -> None:
    process = Process(preload, tmp_path, advice=advice)
    try:
        first = process.address // 4096
        hashed = 0
        for vpn, end in ((0, first), (first, first + HUGE), (first + 2 * HUGE, first + 3 * HUGE)):
            found = process.space.scan(vpn, 1 << 20, end=end)
            assert found.next_vpn == end
            hashed += len(found.checksums)
            assert not len(found.runs) or (found.runs["vpn"][0], found.runs["npages"].sum()) == (vpn, HUGE)
        assert hashed == 2 * HUGE
        assert process.scan(1 << 20) == 2 * HUGE  # what was left out
    finally:
        process.end()


@pytest.mark.parametrize("how", ["fork", "_Fork", "syscall"])
def test_a_look_tells_of_a_fork(process: Process, how: str) -> None:
    assert process.space.scan(0, 1 << 20).forked > 1 << 20
    assert process.tell(how) == "forked\n"
    first = process.space.scan(0, 1 << 20).forked
    assert first < 10
    assert process.space.scan(0, 1 << 20).forked >= first


def test_pages_that_a_fork_shares_are_looked_at_when_they_are_no_longer_shared(process: Process) -> None:
    assert process.tell("stay") == "forked\n"
    assert look(process, 1 << 20) == NOTHING
    assert process.tell("fill 3 10 600") == "filled\n"
    assert look(process, 1 << 20) == NOTHING | {RunKind.HASHED: list(range(10, 610))}
    assert process.tell("leave") == "left\n"
    assert look(process, 1 << 20) == NOTHING | {RunKind.HASHED: [*range(10), *range(610, PAGES)]}
    assert look(process, 1 << 20) == NOTHING


def test_what_is_moved_over_merged_pages_is_found_there(process: Process) -> None:
    merge(process, process.address)
    second = merge(process, int(process.tell("second")))
    assert look(process, 1 << 20) == NOTHING
    assert process.tell("over") == "moved\n"
    (run,) = process.space.scan(0, 1 << 20).runs
    assert (run["vpn"], run["npages"], run["kind"]) == (process.address // 4096, PAGES, RunKind.FOUND)
    assert (run["ino"], run["offset"]) == (second, 0)
    assert look(process, 1 << 20) == NOTHING


def test_broken_pages_are_looked_for_unless_merged_ones_are_to_be_taken_for_still_merged(
    preload: Preload, tmp_path: Path
) -> None:
    process = Process(preload, tmp_path)
    try:
        first = process.address // 4096
        donation = process.space.donate(np.array([(first, PAGES)], AREA))
        process.space.merge(donation.segment, np.array([(first, PAGES, 0)], EXTENT))
        look(process, 1 << 20)
        assert process.tell(5 * 4096) == "written\n"
        assert len(process.space.scan(0, 1 << 20, ScanFlag.STILL).runs) == 0
        (run,) = process.space.scan(0, 1 << 20).runs
        assert (run["vpn"], run["npages"], run["kind"]) == (first + 5, 1, RunKind.BROKEN)
    finally:
        process.end()


TWO_KINDS = """
import ctypes, mmap, sys
n = 1 << 20
areas = [mmap.mmap(-1, n, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(2)]
for area in areas:
    area.madvise(mmap.MADV_NOHUGEPAGE)
addresses = [ctypes.addressof(ctypes.c_char.from_buffer(area)) for area in areas]
areas[1].madvise(mmap.MADV_MERGEABLE)
areas[0][:] = areas[1][:] = b"x" * n
print(addresses[0], flush=True)
print(addresses[1], flush=True)
for line in sys.stdin:
    areas[int(line)][0] = ord("y")
    print("written", flush=True)
"""


def hashed(process: Process, flags: ScanFlag) -> set[int]:
    """The pages that a look from the first page on hashes."""
    runs = [run for found in process.look(flags=flags) for run in found.runs if run["kind"] == RunKind.HASHED]
    return {vpn for run in runs for vpn in range(run["vpn"], run["vpn"] + run["npages"])}


def test_a_look_at_named_memory_passes_over_the_rest_which_a_later_look_finds(preload: Preload, tmp_path: Path) -> None:
    process = Process(preload, tmp_path, TWO_KINDS, SAMEPAGE_MEMORY="mapped")
    try:
        addresses = process.address, int(process.line())
        unnamed, named = (set(range(at // 4096, (at + (1 << 20)) // 4096)) for at in addresses)
        seen = hashed(process, ScanFlag.NAMED)
        assert named <= seen
        assert not unnamed & seen
        assert unnamed <= hashed(process, ScanFlag.NONE)
        assert not hashed(process, ScanFlag.NAMED) & (named | unnamed)
        for which in (0, 1):
            assert process.tell(which) == "written\n"
        assert hashed(process, ScanFlag.NAMED) & (named | unnamed) == {min(named)}
        assert hashed(process, ScanFlag.STILL) & (named | unnamed) == {min(unnamed)}
    finally:
        process.end()


def still(process: Process) -> tuple[int, list[tuple[int, int, int]]]:
    """Pages hashed by a look that need not be one, and what it says of merged pages: vpn, npages, kind."""
    found = process.space.scan(0, 1 << 20, ScanFlag.STILL)
    assert not found.next_vpn
    merged = found.runs[found.runs["kind"] != RunKind.HASHED]
    return len(found.checksums), [tuple(run) for run in merged[["vpn", "npages", "kind"]].tolist()]


def write_from_outside(process: Process, address: int) -> None:
    with open(f"/proc/{process.process.pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(address)
        memory.write(b"outside!")


def test_a_process_without_faults_is_not_looked_at_unless_all_of_it_is_to_be(preload: Preload, tmp_path: Path) -> None:
    process = Process(preload, tmp_path, advice="MADV_NOHUGEPAGE")
    try:
        look(process, 1 << 20)
        assert still(process) == (0, [])
        write_from_outside(process, process.address)  # a fault, but of this process
        assert still(process) == (0, [])
        assert process.scan(1 << 20) == 1
        assert process.tell(5 * 4096) == "written\n"
        assert still(process) == (1, [])
        # A look at a part does not say anything about the rest.
        write_from_outside(process, process.address)
        first = process.address // 4096
        assert not len(process.space.scan(first + HUGE, 1 << 20).checksums)
        assert not len(process.space.scan(0, 1 << 20, end=first).checksums)
        assert still(process) == (1, [])
    finally:
        process.end()


def test_what_changes_without_a_fault_is_seen_at_once(preload: Preload, tmp_path: Path) -> None:
    process = Process(preload, tmp_path, advice="MADV_NOHUGEPAGE")
    try:
        first = process.address // 4096
        look(process, 1 << 20)
        donation = process.space.donate(np.array([(first, PAGES)], AREA))
        process.tell(5 * 4096)
        assert process.scan(1 << 20) == 1
        write_from_outside(process, process.address + 5 * 4096)
        assert process.scan(1 << 20) == 1
        # The page that is different comes home without the protection that it had.
        status = process.space.merge(donation.segment, np.array([(first, PAGES, 0)], EXTENT)).status
        assert np.flatnonzero(status != PageStatus.DONE).tolist() == [5]
        assert process.tell(5 * 4096) == "written\n"
        assert still(process) == (1, [])
        assert still(process) == (0, [])
        assert process.space.break_ksm(first, 2).pages_unmerged == 2
        assert still(process)[0] == 2
        assert still(process) == (0, [])
    finally:
        process.end()


def test_that_merged_pages_were_discarded_is_seen_at_once(process: Process) -> None:
    merge(process, process.address)
    look(process, 1 << 20)
    assert still(process) == (0, [])
    assert process.tell("discard 100 1000") == "done\n"
    assert still(process) == (1000, [(process.address // 4096, PAGES, RunKind.GONE)])


@pytest.mark.parametrize("vpn", [1 << 36, 1 << 52, (1 << 52) + 1, (1 << 64) - 1])
def test_a_look_from_beyond_all_memory_finds_nothing(preload: Preload, tmp_path: Path, vpn: int) -> None:
    """Where such a number of a page becomes an address, it wraps."""
    process = Process(preload, tmp_path, program=PROGRAM)
    try:
        found = process.space.scan(vpn, 1 << 20, end=(1 << 64) - 1)
        assert (len(found.runs), len(found.checksums), found.next_vpn) == (0, 0, 0)
        assert process.space.scan(0, 1 << 20).checksums.size
        assert process.process.poll() is None
    finally:
        process.end()
