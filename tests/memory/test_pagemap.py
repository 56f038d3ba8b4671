"""Which pages a process has, as the kernel says it."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator

import numpy as np
import pytest

from samepage.memory import PAGE_SIZE
from samepage.memory.pagemap import occupied, regions

NPAGES = 16384


@pytest.fixture
def pagemap() -> Iterator[int]:
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("there", [1024, 2048, 2049, 3000, 4096, 8191, 8192])
def test_every_region_is_told_of_once_however_many_there_are(pagemap: int, there: int) -> None:
    """Every other page of so many. Linux 6.18 told twice of the last 512 of a multiple of 1,024."""
    with mmap.mmap(-1, NPAGES * PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        array = np.frombuffer(memory, np.uint8)
        start = array.ctypes.data
        expected = [start + 2 * i * PAGE_SIZE for i in range(there)]
        array[: 2 * there * PAGE_SIZE : 2 * PAGE_SIZE] = 1
        end = start + NPAGES * PAGE_SIZE
        try:
            found = [(first, past) for first, past, _ in regions(pagemap, start, end)]
        except OSError as e:
            if e.errno not in (errno.ENOTTY, errno.EINVAL):
                raise
            found = list(occupied(pagemap, start, end))
        assert found == [(first, first + PAGE_SIZE) for first in expected]
        assert [first for first, _ in occupied(pagemap, start, end)] == expected
        del array
