"""Merging cuts mappings, of which a process may have `vm.max_map_count`, and leaves the program its share of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from samepage.memory import AREA, EXTENT, PageStatus
from tests.agent.asked import HUGE, Process
from tests.agent.preload import Preload

MOST = int(Path("/proc/sys/vm/max_map_count").read_text())
MANY = MOST * 5 // 8

# Has so many mappings of its own, beside the one that may be merged.
PROGRAM = f"""
import ctypes, mmap, sys
area = mmap.mmap(-1, 4 << 21, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.madvise(mmap.MADV_MERGEABLE)
libc = ctypes.CDLL(None)
many = mmap.mmap(-1, {MANY} << 12, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
first = ctypes.addressof(ctypes.c_char.from_buffer(many))
for page in range(0, {MANY}, 2):
    assert libc.mprotect(ctypes.c_void_p(first + (page << 12)), ctypes.c_size_t(4096), 1) == 0
print(ctypes.addressof(ctypes.c_char.from_buffer(area)), flush=True)
sys.stdin.read()
"""


def test_a_third_of_all_is_left_to_a_program_that_has_few(preload: Preload, tmp_path: Path) -> None:
    process = Process(preload, tmp_path, advice="MADV_NOHUGEPAGE")
    try:
        first, pages = process.address // 4096, 4 * HUGE
        before = process.space.map_count()
        assert before[1] == MOST - MOST // 3
        donation = process.space.donate(np.array([(first, pages)], AREA))
        singles = np.array([(first + at, 1, at) for at in range(0, pages, 2)], EXTENT)
        assert (process.space.merge(donation.segment, singles).status == PageStatus.DONE).all()
        after = process.space.map_count()
        assert after[0] >= before[0] + pages - 2
        assert after[1] == before[1]  # they are not the program's
    finally:
        process.end()


@pytest.mark.skipif(MOST > 200_000, reason="vm.max_map_count is too high to have most of it")
def test_as_many_again_are_left_to_a_program_that_has_more(preload: Preload, tmp_path: Path) -> None:
    process = Process(preload, tmp_path, PROGRAM)
    try:
        used, limit = process.space.map_count()
        assert used >= MANY
        assert limit == MOST - used
    finally:
        process.end()
