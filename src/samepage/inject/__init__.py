"""System calls made in the name of a running process, by libsamepage_inject.so (`inject.h` explains how). Every call
releases the GIL, and holds the process while its calls run, some 0.2 ms.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator, Sequence
from enum import IntEnum

from samepage.libraries import installed

NAME = "libsamepage_inject.so"


class Error(IntEnum):
    """`enum inject_error`."""

    (OK, GONE, DENIED, STOPPED, OTHER_BITS, SILENT, BUSY) = range(7)
    (NO_WAY_BACK, NO_STACK, DISPATCHED, FILTERED, NO_MEMORY, STUCK, FAILED) = range(7, 14)


REASONS = {
    Error.GONE: "it has ended, or executed another program",
    Error.DENIED: "permission denied: the kernel does not let this user trace it",
    Error.STOPPED: "it is stopped by a signal",
    Error.OTHER_BITS: "it is not a 64-bit program",
    Error.SILENT: "it does not come out of the kernel: it sleeps there uninterruptibly",
    Error.BUSY: "it was never found where it may be held",
    Error.NO_WAY_BACK: "there is nothing in its code by which it could return if samepage were killed",
    Error.NO_STACK: "there is no room below the stack of its first thread",
    Error.DISPATCHED: "it handles its own system calls (PR_SET_SYSCALL_USER_DISPATCH), as Wine does",
    Error.FILTERED: "it is under seccomp, which could kill it for the call",
    Error.NO_MEMORY: "there is no memory for it: its memory cgroup is full, or the machine is",
    Error.STUCK: "samepage waited too long for memory of it, which another process serves (FUSE, userfaultfd)",
    Error.FAILED: "ptrace failed",
}


class InjectError(Exception):
    """Why nothing was done: `args[0]` is the reason in words, `error` the library's code."""

    def __init__(self, error: Error) -> None:
        super().__init__(REASONS[error])
        self.error = error


class _Call(ctypes.Structure):
    """`struct inject_call`."""

    _fields_ = (("nr", ctypes.c_int64), ("arg", ctypes.c_uint64 * 6), ("ret", ctypes.c_int64))


Call = tuple[int, ...]
"""The number of a system call, and its arguments."""


@functools.cache
def load() -> ctypes.CDLL:
    """The library. OSError when it is missing."""
    library = ctypes.CDLL(str(installed(NAME)))
    library.samepage_inject_calls.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.POINTER(_Call), ctypes.c_size_t]
    library.samepage_inject_unmerge.argtypes = [ctypes.POINTER(Unmerging)]
    library.samepage_inject_headroom.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_int)]
    library.samepage_inject_headroom.restype = ctypes.c_uint64
    return library


def make_calls(pid: int, calls: Sequence[Call], pidfd: int | None = None) -> list[int]:
    """Make system calls in the name of a process, one after the other, until one fails. Returns the kernel's answer to
    each call made, errors as -errno. `pidfd` says which process is meant if something was looked at before: the pid may
    be another's by now. `InjectError`: none was made, or the process ended."""
    made = (_Call * len(calls))()
    for n, (nr, *arguments) in enumerate(calls):
        made[n].nr = nr
        for i, argument in enumerate(arguments):
            made[n].arg[i] = argument
    with opened(pid) if pidfd is None else contextlib.nullcontext(pidfd) as meant:
        error = load().samepage_inject_calls(pid, meant, made, len(calls))
    if error:
        raise InjectError(Error(error))
    answers = []
    for call in made:
        answers.append(int(call.ret))
        if call.ret < 0:
            break
    return answers


@contextlib.contextmanager
def opened(pid: int) -> Iterator[int]:
    """A pidfd. Raises `InjectError` if there is no such process."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as e:
        raise InjectError(Error.GONE) from e
    try:
        yield pidfd
    finally:
        os.close(pidfd)


class Range(ctypes.Structure):
    """`struct range`: addresses of one mapping, and how many bytes of it are merged at most."""

    _fields_ = (("start", ctypes.c_uint64), ("end", ctypes.c_uint64), ("merged", ctypes.c_uint64))


class Unmerging(ctypes.Structure):
    """`struct unmerging`."""

    _fields_ = (
        ("pid", ctypes.c_int),
        ("pidfd", ctypes.c_int),
        ("range", ctypes.POINTER(Range)),
        ("n", ctypes.c_uint64),
        ("reserve", ctypes.c_uint64),
        ("hold_ns", ctypes.c_uint64),
        ("keep", ctypes.c_uint64),
        ("done", ctypes.c_uint64),
        ("needed", ctypes.c_uint64),
        ("available", ctypes.c_uint64),
        ("error", ctypes.c_int64),
        ("unseen", ctypes.c_uint64),
    )


def unmerge(
    pid: int, pidfd: int, ranges: Sequence[tuple[int, int, int]], reserve: int, hold: float, keep: bool
) -> Unmerging:
    """Make MADV_UNMERGEABLE calls in the name of a process, range by range (start, end, bytes merged), for at most
    `hold` seconds. Before each range it looks for memory, and leaves `reserve` bytes. `keep`: the ranges stay
    mergeable. Raises `InjectError`."""
    array = (Range * len(ranges))(*(Range(*each) for each in ranges))
    asked = Unmerging(pid, pidfd, array, len(ranges), reserve, round(hold * 1e9), keep)
    if error := load().samepage_inject_unmerge(ctypes.byref(asked)):
        raise InjectError(Error(error))
    return asked


def headroom(pid: int) -> tuple[int, bool]:
    """How many bytes a process could be given without waking the OOM killer, and whether a limit could not be read
    (then 0)."""
    unseen = ctypes.c_int()
    return int(load().samepage_inject_headroom(pid, ctypes.byref(unseen))), bool(unseen.value)
