"""Somebody writes through /proc/PID/mem, and is held up between looking a page up and writing to it, while the page is
moved and compared: what he writes is not lost.

Two kprobes see to that: the kernel waits before it moves, until the writer has looked the page up, and then the writer
waits. What keeps the byte is a call of the agent's that takes the mmap_lock for writing. Under a seccomp filter that
leaves this call out, and says that it was made, the byte is lost.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.kernels.patience import must

BPF, PERF_EVENT_OPEN = 321, 298
MAP_CREATE, MAP_LOOKUP, PROG_LOAD = 0, 1, 5
ARRAY, KPROBE = 2, 2
GET_PID, READ_KERNEL = 14, 113
SET_BPF, ENABLE = 0x40042408, 0x2400
SECOND_ARGUMENT = 104
"""Where a kprobe finds it, in struct pt_regs."""

UFFDIO_MOVE = 0xC028AA05 - (1 << 32)
PMU = Path("/sys/bus/event_source/devices/kprobe")

HELD = 1 << 20
"""Bytes that are copied to pass the time, again and again."""

SOME = 100
"""How often to find out how long that takes."""

MOVE, WRITE = 0.5, 1.5
"""Seconds, at the move and between looking up and writing: this is longer."""

TRIES = 5
"""Until the byte is lost without a barrier: on a busy machine a processor may stand still for longer than the writer is
held up, and then he writes before the move."""

PAGE = 3
"""Which of the program's pages it is."""


def _bpf(command: int, *attributes: tuple[str, Any]) -> int:
    body = struct.pack("<" + "".join(form for form, _ in attributes), *(value for _, value in attributes))
    text = ctypes.create_string_buffer(body.ljust(128, b"\0"), 128)
    done: int = ctypes.CDLL(None, use_errno=True).syscall(BPF, command, text, 128)
    must(done >= 0, f"bpf({command}): {os.strerror(ctypes.get_errno())}")
    return done


def _new_map(size: int) -> int:
    return _bpf(MAP_CREATE, ("I", ARRAY), ("I", 4), ("I", size), ("I", 1))


def _program(waits: int, scratch: int, flag: int, pid: int) -> int:
    """Of `pid` alone, or, if that is 0, at a call of userfaultfd_ioctl() for a move: set `flag`, and copy HELD bytes of
    `scratch` `waits` times."""

    def do(code: int, to: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
        return struct.pack("<BBhi", code, source << 4 | to, offset, value)

    def value_of(to: int, fd: int) -> bytes:  # BPF_PSEUDO_MAP_VALUE
        return do(0x18, to, 2, 0, fd) + do(0)

    body = b"".join(
        [
            value_of(1, flag),
            do(0x7A, 1, value=1),  # *r1 = 1
            value_of(6, scratch),
            do(0xB7, 7),
            do(0xBF, 1, 6),  # here it begins again
            do(0xB7, 2, value=HELD),
            do(0xBF, 3, 6),
            do(0x85, value=READ_KERNEL),
            do(0x07, 7, value=1),
            do(0xA5, 7, offset=-6, value=waits),
        ]
    )
    what = do(0x85, value=GET_PID) + do(0x77, value=32) if pid else do(0x79, 0, 1, SECOND_ARGUMENT)
    only = do(0x56, offset=len(body) // 8, value=pid or UFFDIO_MOVE)
    code = what + only + body + do(0xB7) + do(0x95)
    text, license_ = ctypes.create_string_buffer(code), ctypes.create_string_buffer(b"GPL")
    return _bpf(
        *(PROG_LOAD, ("I", KPROBE), ("I", len(code) // 8), ("Q", ctypes.addressof(text))),
        ("Q", ctypes.addressof(license_)),
    )


@contextmanager
def probed(function: str, at_return: bool, program: int) -> Iterator[None]:
    """The program runs whenever the kernel is there."""
    name = ctypes.create_string_buffer(function.encode())
    where = ctypes.addressof(name)
    what = struct.pack("<IIQQQQQIIQQ", int((PMU / "type").read_text()), 72, at_return, 1, 0, 0, 0, 0, 0, where, 0)
    text = ctypes.create_string_buffer(what, 72)
    libc = ctypes.CDLL(None, use_errno=True)
    event = libc.syscall(PERF_EVENT_OPEN, text, -1, 0, -1, 8)
    must(event >= 0, f"kprobe at {function}: {os.strerror(ctypes.get_errno())}")
    try:
        must(not libc.ioctl(event, SET_BPF, program), os.strerror(ctypes.get_errno()))
        must(not libc.ioctl(event, ENABLE, 0), os.strerror(ctypes.get_errno()))
        yield
    finally:
        os.close(event)


def _value(fd: int) -> int:
    key, value = ctypes.create_string_buffer(4), ctypes.create_string_buffer(8)
    _bpf(MAP_LOOKUP, ("I", fd), ("I", 0), ("Q", ctypes.addressof(key)), ("Q", ctypes.addressof(value)))
    return int.from_bytes(value.raw, "little")


def seconds_of(program: int, mem: int, address: int) -> float:
    """How long it takes."""
    with probed("get_user_pages_remote", True, program):
        began = time.monotonic()
        os.pread(mem, 1, address)
        return time.monotonic() - began


def write_meanwhile(barrier: bool) -> tuple[bool, bool]:
    """Whether the page was merged, and whether what was written is there."""
    import numpy as np

    from samepage import agent
    from samepage.memory import AREA, EXTENT, PageStatus
    from tests.agent.asked import MADV_DONTFORK, PROGRAM, Process, under_filter
    from tests.agent.preload import Preload

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        program = [sys.executable, "-c", PROGRAM, "MADV_NOHUGEPAGE"]
        command = program if barrier else under_filter(MADV_DONTFORK, 0, program)
        os.sched_setaffinity(0, {0})  # the agent there, the writer here
        process = Process(Preload(agent.library_path(), ""), folder, command=command, SAMEPAGE_SECCOMP="1")
        os.sched_setaffinity(0, {1})
        stack.callback(process.end)
        first = process.address // 4096 + PAGE
        donation = process.space.donate(np.array([(first, 1)], AREA))
        merged: list[bool] = []

        def merge() -> None:
            status = process.space.merge(donation.segment, np.array([(first, 1, 0)], EXTENT)).status
            merged.append(bool(status[0] == PageStatus.DONE))

        scratch, moving, writing = _new_map(HELD), _new_map(8), _new_map(8)
        mem = os.open(f"/proc/{process.process.pid}/mem", os.O_RDWR)
        stack.callback(os.close, mem)
        each = seconds_of(_program(SOME, scratch, writing, os.getpid()), mem, process.address) / SOME
        at_move = _program(int(MOVE / each), scratch, moving, 0)
        at_write = _program(int(WRITE / each), scratch, writing, os.getpid())
        stack.enter_context(probed("userfaultfd_ioctl", False, at_move))
        stack.enter_context(probed("get_user_pages_remote", True, at_write))
        thread = threading.Thread(target=merge)
        thread.start()
        ends = time.monotonic() + 60
        while not _value(moving):
            must(time.monotonic() < ends, "no page was moved in a minute")
        began = time.monotonic()
        os.pwrite(mem, b"\xee", first * 4096 + 8)
        print(f"written in {time.monotonic() - began:.3f} s, {each:.6f} s each", flush=True)
        thread.join()
        must(_value(writing), "the writer was not held up")
        return merged[0], process.tell("check") == "1\n"


def barrier(way: str) -> str:
    if way != "move":
        return "left alone: migration waits for the same lock"
    if not PMU.exists():
        return "left alone: this kernel has no kprobes"
    mine = os.sched_getaffinity(0)
    try:
        for _ in range(TRIES):
            done, there = write_meanwhile(barrier=True)
            must(there, f"a byte that was written from outside is lost, merged: {done}")
            done, there = write_meanwhile(barrier=False)
            if done and not there:
                break
        must(done and not there, "without a barrier nothing is lost, so this proves nothing")
    finally:
        os.sched_setaffinity(0, mine)
    return "ok"
