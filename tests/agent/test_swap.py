"""Pages swapped one by one: each is merged or at home afterwards, whatever came of those before it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from samepage.memory import AREA, EXTENT, PageStatus
from samepage.memory.segments import MemfdSegment
from tests.agent.asked import HUGE, Process
from tests.agent.preload import Preload
from tests.service.fake_agent import sealed

PAGES = 4 * HUGE


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
