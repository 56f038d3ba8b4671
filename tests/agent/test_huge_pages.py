"""Huge pages are looked at and swapped whole: nothing that samepage does makes small ones of them without need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from samepage.memory import AREA, EXTENT, PageStatus
from tests.agent.asked import HUGE, Process
from tests.agent.preload import Preload


@pytest.fixture
def process(preload: Preload, tmp_path: Path) -> Iterator[Process]:
    made = Process(preload, tmp_path)
    if made.huge() < 4:
        made.end()
        pytest.skip("needs transparent huge pages (madvise or always), and four of them free")
    yield made
    made.end()


@pytest.mark.parametrize("budget", [1 << 20, 700, 512])
def test_a_look_leaves_huge_pages_whole(process: Process, budget: int) -> None:
    assert process.scan(budget) == 4 * HUGE
    assert process.huge() == 4
    assert process.scan(budget) == 0


def test_who_asks_for_less_than_a_huge_page_gets_it(process: Process) -> None:
    assert process.scan(100) == 4 * HUGE


def test_a_page_written_in_a_huge_one_is_looked_at_alone(process: Process) -> None:
    process.scan(1 << 20)
    assert process.tell(5 * 4096) == "written\n"
    assert process.scan(1 << 20) == 1
    assert process.huge() >= 3


def test_huge_pages_are_swapped_whole_and_hold_what_they_held(process: Process) -> None:
    first = process.address // 4096
    donation = process.space.donate(np.array([(first, 2 * HUGE)], AREA))
    assert (donation.status == PageStatus.DONE).all()
    assert process.huge() == 4
    result = process.space.merge(donation.segment, np.array([(first, 2 * HUGE, 0)], EXTENT))
    assert (result.status == PageStatus.DONE).all()
    assert process.huge() == 2
    assert process.tell("check") == "0\n"
    broken = process.space.break_ksm(first, 2 * HUGE)
    assert broken.pages_unmerged == 2 * HUGE
    assert process.tell("check") == "0\n"


def test_where_a_part_differs_that_part_stays_and_the_rest_is_merged(process: Process) -> None:
    first = process.address // 4096
    donation = process.space.donate(np.array([(first, HUGE)], AREA))
    # Pages 100 and up with the copies of their neighbours: none is equal; 300 and up in place again.
    extents = [(first, 100, 0), (first + 100, 200, 101), (first + 300, 212, 300)]
    result = process.space.merge(donation.segment, np.array(extents, EXTENT))
    assert (result.status[:100] == PageStatus.DONE).all()
    assert (result.status[100:300] == PageStatus.DIFFERENT).all()
    assert (result.status[300:] == PageStatus.DONE).all()
    assert process.tell("check") == "0\n"


def test_a_whole_huge_page_of_which_a_part_differs_goes_home_in_part(process: Process) -> None:
    first = process.address // 4096
    runs = np.array([(first, 256), (first + HUGE, 256)], AREA)
    donation = process.space.donate(runs)
    assert donation.segment is not None
    assert donation.segment.npages == HUGE
    result = process.space.merge(donation.segment, np.array([(first, HUGE, 0)], EXTENT))
    assert (result.status[:256] == PageStatus.DONE).all()
    assert (result.status[256:] == PageStatus.DIFFERENT).all()
    assert process.tell("check") == "0\n"
    # And the next one is swapped as if nothing had been.
    again = process.space.donate(np.array([(first + 2 * HUGE, HUGE)], AREA))
    result = process.space.merge(again.segment, np.array([(first + 2 * HUGE, HUGE, 0)], EXTENT))
    assert (result.status == PageStatus.DONE).all()
    assert process.tell("check") == "0\n"
