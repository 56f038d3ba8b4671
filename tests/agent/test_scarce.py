"""Where there is less memory left than must be, the agent takes none: not for merging, nor for long answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from samepage.memory import AREA, EXTENT, PageStatus, check
from samepage.memory.segments import MemfdSegment
from tests.agent.asked import HUGE, Process
from tests.agent.preload import Preload
from tests.service.fake_agent import sealed

PAGES = 4 * HUGE
ALL_THERE_IS = 1 << 50
AREAS = 2000
SHORT = 8 << 10
"""Bytes of a packet."""


@pytest.fixture
def process(preload: Preload, tmp_path: Path) -> Iterator[Process]:
    made = Process(preload, tmp_path, advice="MADV_NOHUGEPAGE", reserve=ALL_THERE_IS)
    yield made
    made.end()


def test_nothing_is_merged_with_what_others_donated(process: Process) -> None:
    """Merging gives memory back, but first it takes some for mappings and page tables."""
    first = process.address // 4096
    content = np.zeros((PAGES, 512), np.uint64)
    content[:, 0] = np.arange(PAGES) * 4096
    segment = MemfdSegment(sealed(content.tobytes()), PAGES)
    result = process.space.merge(segment, np.array([(first, PAGES, 0)], EXTENT))
    assert (result.status == PageStatus.NOMEM).all()
    segment.close()
    assert (process.space.donate(np.array([(first, PAGES)], AREA)).status == PageStatus.NOMEM).all()
    assert process.tell("check") == "0\n"


@pytest.mark.parametrize("advice", ["MADV_HUGEPAGE", "MADV_NOHUGEPAGE"])
def test_a_look_is_answered_in_short_packets(preload: Preload, tmp_path: Path, advice: str) -> None:
    """What waits in the socket is charged to the memory cgroup of who sent it."""
    process = Process(preload, tmp_path, advice=advice, reserve=ALL_THERE_IS)
    huge, vpn, seen = process.huge(), 0, 0
    while True:
        found = process.space.scan(vpn, 1 << 20)
        assert found.runs.nbytes + found.checksums.nbytes <= SHORT
        seen += len(found.checksums)
        vpn = found.next_vpn
        if not vpn:
            break
    assert seen == PAGES
    assert process.huge() == huge
    process.end()


def test_a_list_of_areas_is_sent_in_short_packets(
    preload: Preload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = f"""
import mmap, ctypes, sys
n = {AREAS}
area = mmap.mmap(-1, n * 8192, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(n):
    area.madvise(mmap.MADV_MERGEABLE, page * 8192, 4096)
print(ctypes.addressof(ctypes.c_char.from_buffer(area)), flush=True)
sys.stdin.read()
"""
    process = Process(preload, tmp_path, program, reserve=ALL_THERE_IS)
    counts: list[int] = []
    monkeypatch.setattr(check, "areas", lambda count, npages: counts.append(count))
    try:
        assert len(process.space.areas().ranges) == AREAS
    finally:
        process.end()
    assert (np.diff([0, *counts]) * AREA.itemsize <= SHORT).all()
