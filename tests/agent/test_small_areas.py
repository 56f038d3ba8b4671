"""Very many small areas are looked at, and merged, together; each of them is still treated as what it is."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from samepage.memory import AREA, EXTENT, PageStatus, RunKind, ScanFlag
from tests.agent.asked import Process
from tests.agent.preload import Preload

AREAS = 1000
"""One page each; the pages between them are no areas."""

PROGRAM = f"""
import ctypes, mmap, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
code = mmap.mmap(-1, 4096, prot=7)  # a system call that passes no wrapper
code.write(bytes.fromhex("4889f84889f74889d64889ca4d89c24d89c84c8b4c24080f05c3"))
inline = ctypes.CFUNCTYPE(*[ctypes.c_long] * 8)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
def page(i):
    return address + 2 * (i << 12)
def call(name, *arguments):
    arguments = [ctypes.c_void_p(arguments[0]), *map(ctypes.c_size_t, arguments[1:])]
    assert getattr(libc, name)(*arguments) == 0
def put(i, value):
    ctypes.memmove(page(i), value.to_bytes(8, "little"), 8)
def get(i):
    return int.from_bytes(ctypes.string_at(page(i), 8), "little")
address = libc.mmap(None, ctypes.c_size_t({AREAS} << 13), 3, 0x22, -1, ctypes.c_long(0))
call("madvise", address, {AREAS} << 13, 15)  # MADV_NOHUGEPAGE
file = open("/proc/self/exe", "rb")
values = list(range(1, {AREAS} + 1))
for i in range({AREAS}):
    put(i, values[i])
    ctypes.memset(page(i) + 4096, 1, 1)
    call("madvise", page(i), 4096, 12)  # MADV_MERGEABLE
print(address, flush=True)
for line in sys.stdin:
    how, *rest = line.split()
    for i in map(int, rest):
        if how == "write":
            put(i, i << 32)
        elif how == "between":
            ctypes.memset(page(i) + 4096, 2, 1)
        elif how == "discard":
            call("madvise", page(i), 4096, 4)
        elif how == "lock":
            call("mlock", page(i), 4096)
        elif how == "protect":
            call("mprotect", page(i), 4096, 1)
        elif how == "withdraw":
            call("madvise", page(i), 4096, 13)
        elif how == "unmap":
            call("munmap", page(i), 4096)
        elif how == "anew":  # MAP_FIXED, which the agent is not told of
            assert inline(9, page(i), 4096, 3, 0x32, -1, 0) == page(i)
            put(i, i << 33)
        elif how == "file":
            assert inline(9, page(i), 4096, 3, 0x12, file.fileno(), 0) == page(i)
    if how == "check":
        gone = set(map(int, rest))
        print(sum(get(i) != values[i] for i in range({AREAS}) if i not in gone), flush=True)
    else:
        print("done", flush=True)
"""


@pytest.fixture
def process(preload: Preload, tmp_path: Path) -> Iterator[Process]:
    made = Process(preload, tmp_path, PROGRAM)
    yield made
    made.end()


def vpn(process: Process, area: int) -> int:
    return process.address // 4096 + 2 * area


def look(process: Process, flags: ScanFlag = ScanFlag.NONE) -> list[int]:
    """The areas whose pages a look at everything hashes."""
    areas = []
    for found in process.look(flags=flags):
        for run in found.runs:
            assert run["kind"] == RunKind.HASHED
            assert run["npages"] == 1
            areas.append((int(run["vpn"]) - process.address // 4096) // 2)
    return areas


def tell(process: Process, how: str, areas: list[int]) -> None:
    assert process.tell(f"{how} {' '.join(map(str, areas))}") == "done\n"


@pytest.mark.parametrize("flags", [ScanFlag.NONE, ScanFlag.STILL])
def test_each_page_is_told_of_when_it_was_written_and_not_again(process: Process, flags: ScanFlag) -> None:
    assert look(process) == list(range(AREAS))
    assert look(process, flags) == []
    random = np.random.default_rng(1)
    for round in range(40):
        written = sorted({int(i) for i in random.integers(0, AREAS, [1, 5, 400][round % 3])})
        tell(process, "write", written)
        tell(process, "between", written)
        assert look(process, flags) == written
        assert look(process, flags) == []


def test_what_changed_otherwise_than_by_a_write_is_told_of_as_well(process: Process) -> None:
    look(process)
    assert look(process) == []
    tell(process, "discard", [1, 500])
    tell(process, "withdraw", [2, 501])
    tell(process, "lock", [3, 502])
    tell(process, "unmap", [4, 503])
    written = list(range(10))
    tell(process, "write", [i for i in written if i != 4])
    assert look(process) == [i for i in written if i not in (2, 3, 4)]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="has machine code for x86-64")
def test_memory_that_an_inline_call_maps_anew_is_found_some_looks_later(process: Process) -> None:
    look(process)
    assert look(process) == []
    tell(process, "anew", [7, 700])
    found = []
    for _ in range(17):
        found += look(process)
        tell(process, "write", [3])  # so that there is something to look for
    assert {7, 700} <= set(found)


@pytest.mark.parametrize("how", ["lock", "protect", "withdraw", "unmap", "discard", "anew", "file"])
def test_whatever_one_of_them_is_now_its_neighbours_are_merged(process: Process, how: str) -> None:
    """The first of a request, one in the middle, two in a row, and the last."""
    if how in ("anew", "file") and platform.machine() != "x86_64":
        pytest.skip("has machine code for x86-64")
    look(process)
    donation = process.space.donate(np.array([(vpn(process, i), 1) for i in range(AREAS)], AREA))
    assert (donation.status == PageStatus.DONE).all()
    other = [0, 5, 20, 21, 500, AREAS - 1]
    tell(process, how, other)
    extents = np.array([(vpn(process, i), 1, i) for i in range(AREAS)], EXTENT)
    status = process.space.merge(donation.segment, extents).status
    others = np.isin(np.arange(AREAS), other)
    assert (status[~others] == PageStatus.DONE).all()
    expected = {"anew": PageStatus.DIFFERENT, "unmap": PageStatus.GONE, "discard": PageStatus.GONE}
    assert set(status[others].tolist()) <= {expected.get(how, PageStatus.REFUSED), PageStatus.GONE}
    assert process.tell(f"check {' '.join(map(str, other))}") == "0\n"
    broken = sum(process.space.break_ksm(vpn(process, i), 1).pages_unmerged for i in range(AREAS) if i not in other)
    assert broken == AREAS - len(other)
    assert process.tell(f"check {' '.join(map(str, other))}") == "0\n"


def test_pages_that_differ_stay_as_they_are_among_those_that_do_not(process: Process) -> None:
    donation = process.space.donate(np.array([(vpn(process, i), 1) for i in range(AREAS)], AREA))
    wrong = np.random.default_rng(2).random(AREAS) < 0.3
    offset = np.where(wrong, (np.arange(AREAS) + 1) % AREAS, np.arange(AREAS))
    extents = np.array([(vpn(process, i), 1, offset[i]) for i in range(AREAS)], EXTENT)
    status = process.space.merge(donation.segment, extents).status
    assert (status == np.where(wrong, PageStatus.DIFFERENT, PageStatus.DONE)).all()
    assert process.tell("check") == "0\n"
