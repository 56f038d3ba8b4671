"""What changes whenever it is looked at is looked at less (`smart_scan`), and merged once it is at rest."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samepage.ksmd import Ksmd
from samepage.ksmd.advisor import IDLE_SECONDS
from samepage.ksmd.age import BLOCK_PAGES, RESTLESS_PAGES, SKIPS, Ages
from samepage.memory import VPN_END
from samepage.memory.simulated import SimulatedAddressSpace
from samepage.memory.simulated_memory import SimulatedMachine
from tests.ksmd.simulation import Clock, check, new_ksmd, passes

FIRST = 8 * BLOCK_PAGES
CONTENTS = itertools.count(1_000_000, BLOCK_PAGES)

SKIP_AGE = [1, 1, 1, 1, 2, 2, 3, 3, 3, 5, 5]
"""Passes from one look to the next, by skip_age() of mm/ksm.c but for the last; the first follows the first look at the
memory."""


def restless(ksmd: Ksmd, machine: SimulatedMachine, pid: int, blocks: int = 3) -> SimulatedAddressSpace:
    """A process whose first block is about to be written all the time; no two of the other pages are equal."""
    space = SimulatedAddressSpace(machine, pid)
    space.map_area(FIRST, blocks * BLOCK_PAGES)
    space.write(FIRST, *range(1 + pid * 10_000, 1 + pid * 10_000 + blocks * BLOCK_PAGES))
    ksmd.enter(space)
    return space


def looks(ksmd: Ksmd, spaces: list[SimulatedAddressSpace], n: int, pages: int = BLOCK_PAGES) -> list[int]:
    """Write `pages` pages of the first block before each of `n` passes, the same in all; in which they were hashed."""
    seen = []
    for i in range(n):
        content = next(CONTENTS)
        for space in spaces:
            space.write(FIRST, *range(content, content + pages))
        before = spaces[0].pages_hashed
        passes(ksmd)
        if spaces[0].pages_hashed >= before + pages:
            seen.append(i)
    return seen


def test_a_block_that_always_changed_is_skipped_as_the_kernel_skips_a_page() -> None:
    ksmd, machine = new_ksmd(), SimulatedMachine()
    space = restless(ksmd, machine, 1)
    seen = looks(ksmd, [space], 50)
    assert np.diff(seen)[: len(SKIP_AGE)].tolist() == SKIP_AGE
    space.write(FIRST + 2 * BLOCK_PAGES, 5)  # the others are not skipped
    before = space.pages_hashed
    passes(ksmd)
    assert space.pages_hashed == before + 1


def test_without_smart_scan_nothing_is_skipped() -> None:
    ksmd, machine = new_ksmd(), SimulatedMachine()
    space = restless(ksmd, machine, 1)
    looks(ksmd, [space], 30)
    ksmd.set("smart_scan", 0)
    assert looks(ksmd, [space], 20) == list(range(20))


def test_where_less_than_a_quarter_changes_nothing_is_skipped() -> None:
    ksmd, machine = new_ksmd(), SimulatedMachine()
    space = restless(ksmd, machine, 1)
    passes(ksmd)
    assert looks(ksmd, [space], 30, RESTLESS_PAGES - 1) == list(range(30))
    assert len(looks(ksmd, [space], 30, RESTLESS_PAGES)) < 20


def test_what_changes_while_it_is_skipped_is_no_candidate() -> None:
    """Two processes write the same, but never leave it alone for a whole pass: nobody makes a copy of it."""
    ksmd, machine = new_ksmd(), SimulatedMachine()
    spaces = [restless(ksmd, machine, pid) for pid in (1, 2)]
    looks(ksmd, spaces, 60)
    assert not spaces[0].calls.count("donate") + spaces[1].calls.count("donate")


@pytest.mark.parametrize("restless_passes", range(4, 40))
def test_at_rest_it_is_merged(restless_passes: int) -> None:
    ksmd, machine = new_ksmd(), SimulatedMachine()
    spaces = [restless(ksmd, machine, pid) for pid in (1, 2)]
    looks(ksmd, spaces, restless_passes)
    passes(ksmd, 2 * (1 + int(SKIPS[-1])))
    assert ksmd.counters().pages_sharing == BLOCK_PAGES
    assert all(len(space.merged_pages()) == BLOCK_PAGES for space in spaces)
    check(ksmd, machine, {})


def test_at_rest_it_is_looked_at_in_every_pass_again() -> None:
    ksmd, machine = new_ksmd(), SimulatedMachine()
    space = restless(ksmd, machine, 1)
    looks(ksmd, [space], 40)
    passes(ksmd, 2 * (1 + int(SKIPS[-1])))
    for _ in range(3):
        assert looks(ksmd, [space], 1, 7) == [0]


def test_a_process_in_which_only_that_happens_is_taken_to_be_idle() -> None:
    """Passes come a second apart, as when nothing happens, but at once again when something does."""
    clock = Clock()
    ksmd, machine = new_ksmd(clock), SimulatedMachine()
    space = restless(ksmd, machine, 1)

    def wait_and_pass() -> float:
        wait = ksmd.next_wait()
        clock.now += wait
        looks(ksmd, [space], 1)
        return wait

    waits = [wait_and_pass() for _ in range(60)]
    assert waits[-10:] == [pytest.approx(IDLE_SECONDS)] * 10
    assert sum(waits[:5]) < 0.5
    space.write(FIRST + BLOCK_PAGES, 77)
    wait_and_pass()
    assert wait_and_pass() < 0.1


def test_new_memory_in_the_place_of_old_is_looked_at_at_once() -> None:
    ksmd, machine = new_ksmd(), SimulatedMachine()
    space = restless(ksmd, machine, 1)
    looks(ksmd, [space], 40)
    space.unmap(FIRST, BLOCK_PAGES)
    passes(ksmd)
    space.map_area(FIRST, BLOCK_PAGES)
    space.write(FIRST, *range(5, 5 + BLOCK_PAGES))
    before = space.pages_hashed
    passes(ksmd)
    assert space.pages_hashed == before + BLOCK_PAGES


def test_after_everything_was_unmerged_every_page_is_looked_at() -> None:
    ksmd, machine = new_ksmd(), SimulatedMachine()
    spaces = [restless(ksmd, machine, pid) for pid in (1, 2)]
    looks(ksmd, spaces, 40)
    ksmd.set("run", 2)
    ksmd.set("run", 1)
    passes(ksmd, 2)
    assert ksmd.counters().pages_sharing == BLOCK_PAGES


def test_checksums_made_by_other_rules_are_all_made_anew() -> None:
    ksmd, machine = new_ksmd(), SimulatedMachine()
    space = restless(ksmd, machine, 1)
    looks(ksmd, [space], 40)
    before = space.pages_hashed
    ksmd.set("merge_across_nodes", 0)
    passes(ksmd)
    assert space.pages_hashed == before + 3 * BLOCK_PAGES


@given(st.lists(st.sets(st.integers(0, 40)), min_size=1, max_size=25), st.sets(st.integers(0, 40)))
def test_skips_are_those_of_each_block_for_itself(changes: list[set[int]], gone: set[int]) -> None:
    """Against a dictionary. A walk by `ahead` meets exactly the blocks that are not skipped."""
    ages = Ages()
    age: dict[int, int] = {}
    remaining: dict[int, int] = {}
    for changed in changes:
        ages.begin_pass(smart_scan=True)
        skipped = {block for block, n in remaining.items() if n}
        met, vpn = set(), 0
        while vpn < 41 * BLOCK_PAGES:
            vpn, end = ages.ahead(vpn)
            met |= set(range(vpn // BLOCK_PAGES, min(end // BLOCK_PAGES, 41)))
            assert vpn % BLOCK_PAGES == 0
            vpn = end
        assert met == set(range(41)) - skipped
        assert ages.skipping == bool(skipped)
        found = sorted(changed - skipped)
        for half in (found[::2], found[1::2]):  # in several answers
            if half:
                pages = np.concatenate([np.arange(RESTLESS_PAGES) + b * BLOCK_PAGES for b in half])
                old = [b for b in half if SKIPS[min(age.get(b, 0), len(SKIPS) - 1)]]
                assert ages.changed(pages) == RESTLESS_PAGES * len(old)
        ages.end_pass()
        age = {b: age.get(b, 0) + (b not in skipped) for b in skipped | set(found)}
        remaining = {b: remaining[b] - 1 if b in skipped else int(SKIPS[min(age[b], len(SKIPS) - 1)]) for b in age}
        pages = np.arange(41) * BLOCK_PAGES + 7
        assert ages.remaining_skips(pages).tolist() == [remaining.get(b, 0) for b in range(41)]
        assert ages.remaining == any(remaining.values())
    ages.begin_pass(smart_scan=True)
    first = np.array([b * BLOCK_PAGES + 3 for b in sorted(gone)], np.int64)
    ages.forget(first, first + 2)
    left = [0 if b in gone else remaining.get(b, 0) for b in range(41)]
    assert ages.remaining_skips(np.arange(41) * BLOCK_PAGES).tolist() == left
    assert ages.ahead(42 * BLOCK_PAGES) == (42 * BLOCK_PAGES, VPN_END)
    ages.begin_pass(smart_scan=False)
    assert not ages.skipping
