"""A peer that donates holes: whoever compares with them is not made to fill them, up to its limit and beyond."""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.memory_cgroup import MemoryCgroup
from samepage import agent
from samepage.memory import EXTENT, AddressSpaceGone, PageStatus
from samepage.memory.segments import SEALS, MemfdSegment, SegmentError
from tests.agent.asked import HUGE, Process
from tests.agent.preload import Preload
from tests.oom.conftest import MIB, needs_agent

pytestmark = needs_agent

PAGES = 4 * HUGE
SIZE = PAGES * 4096
FALLOC_FL_KEEP_SIZE = 1


def holes(blocks: bool) -> int:
    """A sealed memfd of holes. `blocks`: it has as many blocks as if there were none, but they lie behind its end."""
    fd = os.memfd_create("holes", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    if blocks:
        size = ctypes.c_long(SIZE)
        assert ctypes.CDLL(None).fallocate(fd, FALLOC_FL_KEEP_SIZE, size, size) == 0
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return fd


@pytest.fixture
def cramped(group: MemoryCgroup, tmp_path: Path) -> Iterator[Process]:
    """A process with `PAGES` to merge that may be given half as much."""
    process = Process(Preload(agent.library_path(), ""), tmp_path, advice="MADV_NOHUGEPAGE")
    (group.path / "cgroup.procs").write_text(str(process.process.pid))
    group.set_limit(SIZE // 2)
    yield process
    process.end()


def test_the_service_takes_no_holes_for_a_segment() -> None:
    with pytest.raises(SegmentError, match="holes"):
        MemfdSegment(holes(False), PAGES)


@pytest.mark.parametrize("blocks", [False, True])
def test_who_compares_with_holes_fills_none_that_there_is_no_memory_for(
    cramped: Process, group: MemoryCgroup, monkeypatch: pytest.MonkeyPatch, blocks: bool
) -> None:
    monkeypatch.setattr(MemfdSegment, "_check", lambda self: os.fstat(self.fileno()).st_ino)  # this service believes it
    segment = MemfdSegment(holes(blocks), PAGES)
    cramped.space._has.add(segment)  # and that the process has proved to have a page of it
    extents = np.array([(cramped.address // 4096 + 1, PAGES - 1, 0)], EXTENT)  # the first is of zeros
    try:
        status = cramped.space.merge(segment, extents).status
        assert blocks
        assert set(np.unique(status)) == {PageStatus.DIFFERENT, PageStatus.NOMEM}
    except AddressSpaceGone:
        assert not blocks
    assert cramped.tell("check") == "0\n"
    assert group.usage() < SIZE // 2 - MIB // 2
    assert (group.killed(), group.refused()) == (0, 0)
    segment.close()
