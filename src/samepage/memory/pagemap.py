"""What the kernel says of a process's pages: /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst)."""

from __future__ import annotations

import fcntl
import struct
from collections.abc import Iterator

import numpy as np

# include/uapi/linux/fs.h, Linux 6.7: ioctl PAGEMAP_SCAN, struct pm_scan_arg, struct page_region.
PAGEMAP_SCAN = 0xC0606610
PM_SCAN_ARG = struct.Struct("12Q")
REGION = np.dtype([("start", "<u8"), ("end", "<u8"), ("categories", "<u8")])
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
        walked: int = PM_SCAN_ARG.unpack(arg)[4]
        if walked <= start:
            return
        start = walked
