"""What the agent does where an older kernel lacks a call: by flags that have calls answer as they did there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from samepage.memory import AREA, EXTENT, PageStatus
from samepage.memory.wire import Flags, Swap
from tests.agent.asked import HUGE, Process
from tests.agent.preload import Preload

PAGES = 4 * HUGE
KERNELS = [Flags.LIKE_5_10, Flags.LIKE_6_1]


@pytest.fixture(params=KERNELS, ids=lambda flags: flags.name.lower())
def old(preload: Preload, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Process]:
    made = Process(preload, tmp_path, advice="MADV_NOHUGEPAGE", flags=request.param | Flags.SWAP_WP)
    if made.space.swap != Swap.WP:
        pytest.skip("this user's userfaultfd does not hold up system calls")
    yield made
    made.end()


def merge(process: Process, piece: int) -> None:
    """All pages with two segments in turn, so that each piece is a mapping of its own."""
    first = process.address // 4096
    whole = np.array([(first, PAGES)], AREA)
    donations = [process.space.donate(whole) for _ in range(2)]
    extents = np.array([(first + at, piece, at) for at in range(0, PAGES, piece)], EXTENT)
    for n, donation in enumerate(donations):
        assert (donation.status == PageStatus.DONE).all()
        assert (process.space.merge(donation.segment, extents[n::2]).status == PageStatus.DONE).all()
        assert donation.segment is not None
        donation.segment.close()


def mapped_from_segments(process: Process) -> int:
    """Mappings of the process."""
    return Path(f"/proc/{process.process.pid}/maps").read_text().count("memfd:samepage")


def shared(process: Process) -> int:
    """Pages of the area that are a segment's."""
    with open(f"/proc/{process.process.pid}/pagemap", "rb") as pagemap:
        entries = np.frombuffer(os.pread(pagemap.fileno(), PAGES * 8, process.address // 4096 * 8), "<u8")
    return int(np.count_nonzero(entries >> np.uint64(61) & np.uint64(1)))


@pytest.mark.parametrize("piece", [8, PAGES // 2])
def test_an_unmerge_gives_every_page_a_copy(old: Process, piece: int) -> None:
    merge(old, piece)
    assert (shared(old), mapped_from_segments(old)) == (PAGES, PAGES // piece)
    broken = old.space.break_ksm(old.address // 4096, PAGES)
    assert (broken.errno, broken.pages_unmerged, broken.pages_remaining) == (0, PAGES, 0)
    assert shared(old) == 0
    assert old.tell("check") == "0\n"


@pytest.mark.parametrize("old", [Flags.LIKE_6_1], indirect=True, ids=["like_6_1"])
def test_an_unmerge_over_many_mappings_leaves_none_of_a_segment(old: Process) -> None:
    """Before Linux 6.4 UFFDIO_WRITEPROTECT takes one at a time. Private copies in mappings of segments would take the
    segments' memory besides."""
    merge(old, 8)
    assert old.space.break_ksm(old.address // 4096, PAGES).pages_unmerged == PAGES
    assert mapped_from_segments(old) == 0
    old.scan(1 << 20)
    merge(old, 8)
    assert shared(old) == PAGES
    assert old.tell("check") == "0\n"


def test_every_look_hashes_all_and_finds_what_was_written(old: Process) -> None:
    assert old.scan(1 << 20) == PAGES
    merge(old, PAGES // 2)
    assert old.tell(5 * 4096) == "written\n"
    found = old.space.scan(0, 1 << 20)
    assert [(int(run["vpn"]) - old.address // 4096, int(run["npages"])) for run in found.runs if run["kind"]] == []
    assert shared(old) == PAGES - 1
