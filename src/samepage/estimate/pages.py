"""libsamepage_scan.so as Python sees it: reading and hashing pages, and asking what kind of page a frame is.

Every call releases the GIL.
"""

from __future__ import annotations

import ctypes
import functools

import numpy as np
import numpy.typing as npt

from samepage.arrays import Ints, run_starts
from samepage.libraries import installed
from samepage.memory import PAGE_SIZE, U8, U64

NAME = "libsamepage_scan.so"

RUN = np.dtype([("offset", "<u8"), ("npages", "<u8")])
"""Pages that follow each other: where the first is in the file, in bytes, and how many there are. 16 bytes."""

PAGE_READ = 1
PAGE_CHUNK = 2
"""States of a hashed page (`pages.c`): it was read; it looks like the start of a large block of glibc's malloc."""

Runs = npt.NDArray[np.void]


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(installed(NAME)))
    pointer, u64 = ctypes.c_void_p, ctypes.c_uint64
    library.samepage_scan_hash.argtypes = [ctypes.c_int, pointer, u64, pointer, pointer]
    library.samepage_scan_hash.restype = ctypes.c_int64
    library.samepage_scan_frames.argtypes = [ctypes.c_int, pointer, u64, pointer]
    library.samepage_scan_frames.restype = None
    return library


def runs(vpns: Ints, shift: int) -> Runs:
    """Pages by number, each `shift` bytes further up in the file, as runs."""
    starts = run_starts(vpns)
    out = np.empty(len(starts), RUN)
    # Modulo 2**64: a core dump may have pages at the very end of the address space.
    out["offset"] = vpns[starts].astype(np.uint64) * np.uint64(PAGE_SIZE) + np.uint64(shift % (1 << 64))
    out["npages"] = np.diff(np.append(starts, len(vpns)))
    return out


def hash_runs(fd: int, runs: Runs, sums: U64, states: U8) -> int:
    """Hash the pages of `runs` (dtype `RUN`), in order, into `sums` and `states`, one entry a page; returns how many
    could be read. Any thread may do it. MemoryError."""
    runs = np.ascontiguousarray(runs, RUN)
    count: int = _library().samepage_scan_hash(fd, runs.ctypes.data, len(runs), sums.ctypes.data, states.ctypes.data)
    if count < 0:
        raise MemoryError("no memory for a buffer to read pages into")
    return count


def frame_entries(fd: int, pfns: U64) -> U64:
    """What /proc/kpageflags or /proc/kpagecount, open as `fd`, has for each page frame number; 0 where nothing."""
    out = np.empty(len(pfns), np.uint64)
    pfns = np.ascontiguousarray(pfns, np.uint64)
    _library().samepage_scan_frames(fd, pfns.ctypes.data, len(pfns), out.ctypes.data)
    return out


@functools.cache
def zero_checksum() -> int:
    """The checksum of a page of zeros."""
    import os

    with open(os.memfd_create("zero"), "rb") as file:
        os.ftruncate(file.fileno(), PAGE_SIZE)
        sums, states = np.empty(1, np.uint64), np.empty(1, np.uint8)
        hash_runs(file.fileno(), np.array([(0, 1)], RUN), sums, states)
    return int(sums[0])
