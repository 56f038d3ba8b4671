"""What the kernel says of a process's pages: /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst)."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator

import numpy as np

from samepage.memory import PAGE_SIZE

# include/uapi/linux/fs.h, Linux 6.7: ioctl PAGEMAP_SCAN, struct pm_scan_arg, struct page_region.
PAGEMAP_SCAN = 0xC0606610
PM_SCAN_ARG = struct.Struct("12Q")
REGION = np.dtype([("start", "<u8"), ("end", "<u8"), ("categories", "<u8")])
PRESENT, SWAPPED, FILE, EXCLUSIVE = (np.uint64(1 << n) for n in (63, 62, 61, 56))
"""Bits of an entry of the file itself."""

PAGE_IS_FILE, PAGE_IS_PRESENT, PAGE_IS_SWAPPED, PAGE_IS_PFNZERO, PAGE_IS_HUGE = (1 << n for n in (2, 3, 4, 5, 6))


def regions(pagemap: int, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Regions of addresses [start, end) with pages in them: first, past the last, and what these are (PAGE_IS_...).

    OSError: the process has ended; ENOTTY or EINVAL, and no region before: the kernel cannot tell (before 6.7).
    """
    found = np.empty(1024, REGION)
    wanted = PAGE_IS_PRESENT | PAGE_IS_SWAPPED
    told = wanted | PAGE_IS_FILE | PAGE_IS_PFNZERO | PAGE_IS_HUGE
    while start < end:
        arg = bytearray(
            PM_SCAN_ARG.pack(PM_SCAN_ARG.size, 0, start, end, 0, found.ctypes.data, len(found), 0, 0, 0, wanted, told)
        )
        count = fcntl.ioctl(pagemap, PAGEMAP_SCAN, arg)
        yield from found[:count].tolist()
        # The kernel walks in steps of 512 regions. If a step before the last one filled its buffer, it says that it got
        # to where that one ended (seen on Linux 6.18). Regions beyond, which it told of, must not come again.
        walked = max(PM_SCAN_ARG.unpack(arg)[4], int(found["end"][count - 1]) if count else 0)
        if walked <= start:
            return
        start = walked


def occupied(pagemap: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Ranges of addresses in [start, end) with pages that are neither absent nor the kernel's zero page.

    OSError: the process has ended.
    """
    try:
        for first, past, categories in regions(pagemap, start, end):
            if not categories & PAGE_IS_PFNZERO:
                yield first, past
    except OSError as e:
        if e.errno not in (errno.ENOTTY, errno.EINVAL):
            raise
        yield from _counted(pagemap, start, end)


def _counted(pagemap: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The same before Linux 6.7, entry by entry, in which the zero page looks like a page that a fork shares: both are
    left out."""
    while start < end:
        entries = np.frombuffer(
            os.pread(pagemap, min((end - start) // PAGE_SIZE, 1 << 16) * 8, start // PAGE_SIZE * 8), "<u8"
        )
        if not len(entries):
            return
        there = (entries & PRESENT != 0) & (entries & (FILE | EXCLUSIVE) != 0) | (entries & SWAPPED != 0)
        edges = np.flatnonzero(np.diff(np.concatenate(([False], there, [False]))))
        for first, past in edges.reshape(-1, 2).tolist():
            yield start + first * PAGE_SIZE, start + past * PAGE_SIZE
        start += len(entries) * PAGE_SIZE
