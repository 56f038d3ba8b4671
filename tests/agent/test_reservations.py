"""Addresses that a program reserves are no memory, and what it makes writable of them is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from samepage.memory import PAGE_SIZE
from tests.agent.asked import Process
from tests.agent.preload import Preload

RESERVED = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
NONE, READ, WRITE = 0, 1, 3
PRIVATE_ANONYMOUS_NORESERVE = 0x4022
def reserve(length, prot):
    return libc.mmap(None, length, prot, PRIVATE_ANONYMOUS_NORESERVE, -1, 0)
"""

PIECES = """
start = reserve(64 << 30, NONE)
assert libc.mprotect(start + (1 << 30), 32 << 20, WRITE) == 0
assert libc.mprotect(start + (2 << 30), 32 << 20, READ) == 0
assert libc.mprotect(start + (1 << 30) + (8 << 20), 8 << 20, NONE) == 0  # was writable, and stays known
print(start, flush=True)
for line in sys.stdin:
    assert libc.mprotect(start + (2 << 30), 16 << 20, WRITE) == 0
    ctypes.memset(start + (2 << 30), 7, 16 << 20)
    print("written", flush=True)
"""

TERABYTES = """
start = reserve(8 << 40, WRITE)
assert start
ctypes.memset(start, 7, 1 << 20)
other = reserve(32 << 20, WRITE)
print(start, flush=True)
for line in sys.stdin:
    assert libc.mprotect(start, 1 << 20, WRITE) == 0
    print("protected", flush=True)
"""


def within(process: Process, length: int) -> list[tuple[int, int]]:
    """What of the reservation the service is told of: (first byte, bytes)."""
    told = []
    for area in process.space.areas().ranges:
        start = int(area["vpn"]) * PAGE_SIZE - process.address
        end = start + int(area["npages"]) * PAGE_SIZE
        if start < length and end > 0:
            told.append((max(start, 0), min(end, length) - max(start, 0)))
    return told


Start = Callable[[str], Process]


@pytest.fixture
def reserved(preload: Preload, tmp_path: Path) -> Iterator[Start]:
    started: list[Process] = []

    def start(program: str) -> Process:
        started.append(Process(preload, tmp_path, RESERVED + program, SAMEPAGE_MEMORY="mapped"))
        return started[-1]

    yield start
    for process in started:
        process.end()


def test_of_a_reservation_what_was_made_writable_is_mergeable_and_no_more(reserved: Start) -> None:
    process = reserved(PIECES)
    assert within(process, 64 << 30) == [(1 << 30, 32 << 20)]
    assert process.tell("write") == "written\n"
    assert within(process, 64 << 30) == [(1 << 30, 32 << 20), (2 << 30, 16 << 20)]
    assert process.scan(1 << 20) >= (16 << 20) // PAGE_SIZE


def test_what_is_larger_than_the_machines_memory_is_no_memory_but_a_piece_that_is_protected_is(reserved: Start) -> None:
    process = reserved(TERABYTES)
    assert within(process, 8 << 40) == []
    assert process.tell("protect") == "protected\n"
    assert within(process, 8 << 40) == [(0, 1 << 20)]
