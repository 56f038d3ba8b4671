"""Pages swapped one by one: each is merged or at home afterwards, whatever came of those before it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from samepage.memory import AREA, EXTENT, AddressSpaceGone, PageStatus
from samepage.memory.segments import MemfdSegment
from tests.agent.asked import HUGE, Process
from tests.agent.preload import Preload
from tests.service.fake_agent import sealed

PAGES = 4 * HUGE

FORKED_PAGES = 600
FORKED = f"""
import ctypes, mmap, os, sys
n = {FORKED_PAGES}
area = mmap.mmap(-1, n * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.madvise(mmap.MADV_NOHUGEPAGE)
def content(page):
    return (page * 4096).to_bytes(8, "little")
for page in range(n):
    area[page * 4096 : page * 4096 + 8] = content(page)
area.madvise(mmap.MADV_MERGEABLE)
print(ctypes.addressof(ctypes.c_char.from_buffer(area)), flush=True)
for line in sys.stdin:
    if line == "fork\\n":
        end, keep = os.pipe()
        if os.fork() == 0:
            os.close(keep)
            os.read(end, 1)
            os._exit(0)
        for page in range(0, n, 3):
            area[page * 4096] ^= 0
        for page in range(1, n, 7):
            area.madvise(mmap.MADV_DONTNEED, page * 4096, 4096)
        print("forked", flush=True)
    else:
        zeros = bytes(8)
        print(sum(area[p * 4096 : p * 4096 + 8] != (zeros if p % 7 == 1 else content(p)) for p in range(n)), flush=True)
"""
"""A child shares all but every third page from then on, and of the parent's every seventh is not there any more."""


@pytest.fixture
def process(preload: Preload, tmp_path: Path) -> Iterator[Process]:
    made = Process(preload, tmp_path, advice="MADV_NOHUGEPAGE")
    yield made
    made.end()


@pytest.mark.parametrize("length", [1, 3, 70])
def test_runs_anywhere_some_of_which_differ(process: Process, length: int) -> None:
    """In one request, more pages than the agent keeps aside: those that differ among them must not be lost with those
    that are done with."""
    first = process.address // 4096
    donation = process.space.donate(np.array([(first, PAGES)], AREA))
    assert (donation.status == PageStatus.DONE).all()
    random = np.random.default_rng(length)
    starts = random.permutation(np.arange(0, PAGES - length, length))
    wrong = random.random(len(starts)) < 0.3
    extents = np.empty(len(starts), EXTENT)
    extents["vpn"], extents["npages"], extents["offset"] = first + starts, length, (starts + wrong) % PAGES
    result = process.space.merge(donation.segment, extents)
    assert (result.status == np.repeat(np.where(wrong, PageStatus.DIFFERENT, PageStatus.DONE), length)).all()
    assert process.tell("check") == "0\n"
    # What differed from another page is merged with its own.
    extents = extents[wrong]
    extents["offset"] = extents["vpn"] - first
    assert (process.space.merge(donation.segment, extents).status == PageStatus.DONE).all()
    assert process.tell("check") == "0\n"
    merged = length * len(starts)
    assert process.space.break_ksm(first, PAGES).pages_unmerged == merged
    assert process.tell("check") == "0\n"


@pytest.mark.parametrize("longest", [1, 2, 9, 40])
def test_small_extents_with_gaps_between(process: Process, longest: int) -> None:
    """Several are swapped at once. Others, in requests before, have cut the memory around into mappings."""
    first = process.address // 4096
    donation = process.space.donate(np.array([(first, PAGES)], AREA))
    random = np.random.default_rng(longest)
    cuts = np.unique(np.cumsum(random.integers(1, longest + 1, PAGES)))
    starts = np.concatenate(([0], cuts[cuts < PAGES]))
    lengths = np.diff(np.append(starts, PAGES))
    wrong = random.random(len(starts)) < 0.1
    turn = random.integers(0, 5, len(starts))
    for requested in range(5):
        these = np.flatnonzero(turn == requested)
        extents = np.empty(len(these), EXTENT)
        extents["vpn"], extents["npages"] = first + starts[these], lengths[these]
        extents["offset"] = np.where(wrong[these], PAGES - starts[these] - lengths[these], starts[these])
        result = process.space.merge(donation.segment, extents)
        right = np.repeat(extents["offset"], lengths[these]) == np.repeat(starts[these], lengths[these])
        assert (result.status == np.where(right, PageStatus.DONE, PageStatus.DIFFERENT)).all()
        assert process.tell("check") == "0\n"
    broken = process.space.break_ksm(first, PAGES)
    assert broken.pages_unmerged >= 0.8 * PAGES
    assert process.tell("check") == "0\n"


@pytest.mark.parametrize("step", [1, 2])
def test_pages_that_a_child_shares_or_that_are_gone(preload: Preload, tmp_path: Path, step: int) -> None:
    """With `step` 2 each page stands alone and is moved without asking before what it is."""
    process = Process(preload, tmp_path, FORKED)
    first = process.address // 4096
    donation = process.space.donate(np.array([(first, FORKED_PAGES)], AREA))
    assert process.tell("fork") == "forked\n"
    pages = np.arange(0, FORKED_PAGES, step)
    extents = np.empty(len(pages), EXTENT)
    extents["vpn"], extents["npages"], extents["offset"] = first + pages, 1, pages
    result = process.space.merge(donation.segment, extents)
    gone, own = pages % 7 == 1, pages % 3 == 0
    assert (result.status == np.where(gone, PageStatus.GONE, np.where(own, PageStatus.DONE, PageStatus.BUSY))).all()
    with open(f"/proc/{process.process.pid}/pagemap", "rb") as pagemap:
        pagemap.seek(first * 8)
        entries = np.frombuffer(pagemap.read(FORKED_PAGES * 8), np.uint64)[::step]
    file, exclusive = entries >> np.uint64(61) & np.uint64(1) == 1, entries >> np.uint64(56) & np.uint64(1) == 1
    shared = ~gone & ~own
    assert file[own & ~gone].all()
    assert not file[shared].any()
    assert not exclusive[shared].any()  # what a child shares is not copied in vain
    assert process.tell("check") == "0\n"
    process.end()


def test_extents_beyond_all_memory_are_refused(process: Process) -> None:
    """A service that talks nonsense gets an error, and the process goes on."""
    first = process.address // 4096
    donation = process.space.donate(np.array([(first, 2)], AREA))
    with pytest.raises(AddressSpaceGone):
        process.space.merge(donation.segment, np.array([((1 << 52) + first, 1, 0), (first + 1, 1, 1)], EXTENT))
    assert process.tell("check") == "0\n"


def test_pages_in_a_row_take_one_mapping_however_often_the_lock_is_let_go(process: Process) -> None:
    first = process.address // 4096
    donation = process.space.donate(np.array([(first, PAGES)], AREA))
    before = process.space.map_count()[0]
    assert (
        process.space.merge(donation.segment, np.array([(first, PAGES, 0)], EXTENT)).status == PageStatus.DONE
    ).all()
    assert process.space.map_count()[0] - before <= 2


def test_a_segment_larger_than_the_view_of_it(process: Process) -> None:
    """An agent takes any sealed segment; an extent may begin anywhere in it, and cross where one view of it ends."""
    first = process.address // 4096
    content = np.zeros((3 * PAGES, 512), np.uint64)
    at = 3 * PAGES // 2 + 100
    content[at : at + PAGES, 0] = np.arange(PAGES) * 4096
    segment = MemfdSegment(sealed(content.tobytes()), 3 * PAGES)
    result = process.space.merge(segment, np.array([(first, PAGES, at)], EXTENT))
    assert (result.status == PageStatus.DONE).all()
    assert process.tell("check") == "0\n"
    assert process.space.break_ksm(first, PAGES).pages_unmerged == PAGES
    assert process.tell("check") == "0\n"
    segment.close()
