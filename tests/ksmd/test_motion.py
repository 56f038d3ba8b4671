"""A process that fills memory which nobody named is looked at when it has come to rest."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from samepage.ksmd import Ksmd
from samepage.ksmd.advisor import FAULT_SECONDS
from samepage.ksmd.mm_slot import MmSlot
from samepage.ksmd.motion import GLANCE_SECONDS, MOST_SECONDS, PAGE_SECONDS, Motion
from samepage.memory import ScanResult, Stirring
from samepage.memory.simulated import SimulatedAddressSpace
from samepage.memory.simulated_memory import SimulatedMachine
from tests.ksmd.simulation import BASE, SAME, Clock, check, new_ksmd, process

SHARE = 0.02
MANY = 100_000
"""Page faults a second, of a program that fills memory as fast as it can."""
START = 5000
"""Page faults until it joins."""


def faults(clock: Clock) -> int:
    return START + int((clock.now - 100) * MANY)


def wait_until_due(motion: Motion, clock: Clock, before: int, pages: int, rate: int) -> float:
    """Seconds until the process is looked at, if it has so many page faults a second."""
    began = clock.now
    while not motion.is_due(clock.now, before + int((clock.now - began) * rate), pages, 0.0, SHARE):
        clock.now += 0.02
    return clock.now - began


@pytest.mark.parametrize(("moved", "rests"), [(0.02, 0.1), (0.5, 0.5), (5.0, 1.0)])
def test_a_process_rests_for_as_long_as_it_was_in_motion_but_no_longer_than_a_second(
    moved: float, rests: float
) -> None:
    clock = Clock()
    motion, ends = Motion(clock.now), clock.now + moved
    while clock.now < ends:
        assert not motion.is_due(clock.now, faults(clock), 1 << 30, 0.0, SHARE)
        clock.now += 0.02
    assert wait_until_due(motion, clock, faults(clock), 1 << 30, 0) == pytest.approx(rests, abs=0.05)


def test_a_process_that_never_rests_is_looked_at_for_its_share_of_the_time() -> None:
    clock = Clock()
    waited = wait_until_due(Motion(clock.now), clock, START, 10_000, MANY)
    assert waited == pytest.approx(10_000 * PAGE_SECONDS / SHARE, rel=0.05)


def test_a_large_process_that_never_rests_is_looked_at_all_the_same() -> None:
    clock = Clock()
    assert wait_until_due(Motion(clock.now), clock, START, 1 << 30, MANY) == pytest.approx(MOST_SECONDS, abs=0.05)


def test_a_process_that_works_in_memory_it_has_is_not_at_rest() -> None:
    clock = Clock()
    motion, began = Motion(clock.now), clock.now

    def waited(works_for: float) -> float:
        start = clock.now
        while not motion.is_due(clock.now, 20_000, 1 << 30, min(clock.now, began + works_for), SHARE):
            clock.now += 0.02
        return clock.now - start

    assert waited(10.0) == pytest.approx(20_000 * PAGE_SECONDS / SHARE, rel=0.05)
    clock.now, motion = began, Motion(began)
    assert waited(1.5) == pytest.approx(1.5 + 1.0, abs=0.25)


def run_for(ksmd: Ksmd, clock: Clock, seconds: float, *movers: SimulatedAddressSpace) -> int:
    """Call ksmd whenever it wants to be. Returns how often that was."""
    ends, calls = clock.now + seconds, 0
    while clock.now + (wait := ksmd.next_wait()) < ends:
        clock.now += max(wait, 0.001)
        for space in movers:
            space.stirred = Stirring(int(clock.now * MANY), 1 << 30, 0.0)
        ksmd.do_scan()
        calls += 1
    clock.now = ends
    return calls


def filling(machine: SimulatedMachine, pid: int) -> SimulatedAddressSpace:
    space = SimulatedAddressSpace(machine, pid)
    space.map_area(BASE, 256, named=False)
    space.write(BASE, *SAME)
    space.stirred = Stirring(int(100 * MANY), 1 << 30, 0.0)
    return space


def test_nothing_is_asked_of_a_process_while_it_fills_its_memory_and_ksmd_sleeps_meanwhile() -> None:
    clock, machine = Clock(), SimulatedMachine()
    ksmd = new_ksmd(clock)
    spaces = [filling(machine, pid) for pid in (100, 101)]
    for space in spaces:
        ksmd.enter(space)
    assert run_for(ksmd, clock, 3.0, *spaces) < 12
    assert not any(space.pages_hashed for space in spaces)
    assert not ksmd.counters().full_scans
    run_for(ksmd, clock, 4.0)
    assert ksmd.counters().pages_sharing == len(SAME)
    assert ksmd.counters().full_scans >= 2


def takes_time(scan: Callable[..., ScanResult], clock: Clock, spent: list[float]) -> Callable[..., ScanResult]:
    def slow(*args: Any) -> ScanResult:
        clock.now += 0.003
        spent[0] += 0.003
        return scan(*args)

    return slow


@pytest.mark.parametrize("joins", [0.05, 0.5, 1.5])
def test_a_newcomer_that_comes_to_rest_is_merged_soon_although_looks_take_time(joins: float) -> None:
    clock, machine, spent = Clock(), SimulatedMachine(), [0.0]
    ksmd = Ksmd(clock=clock, cpu_clock=lambda: spent[0])

    def enter(pid: int) -> float:
        space = filling(machine, pid)
        space.scan = takes_time(space.scan, clock, spent)  # type: ignore[method-assign]
        began = clock.now
        moves = lambda: Stirring(START + int(min(clock.now - began, 0.02) * MANY), 1 << 30, 0.0)  # noqa: E731
        space.stirring = moves  # type: ignore[method-assign]
        ksmd.enter(space)
        return began

    run_for(ksmd, clock, joins - (clock.now - enter(100)))
    began = enter(101)
    while clock.now < began + 5.0 and not ksmd.counters().pages_sharing:
        clock.now += max(ksmd.next_wait(), 0.001)
        ksmd.do_scan()
    assert clock.now - began < 0.5


def test_looks_at_a_few_new_pages_at_a_time_cost_no_more_than_their_share_either() -> None:
    clock, machine, spent = Clock(), SimulatedMachine(), [0.0]
    ksmd = Ksmd(clock=clock, cpu_clock=lambda: spent[0])
    space = SimulatedAddressSpace(machine, 100)
    space.map_area(BASE, 100_000)
    space.scan = takes_time(space.scan, clock, spent)  # type: ignore[method-assign]
    ksmd.enter(space)
    written, began = 0, clock.now
    while clock.now < began + 10.0:
        clock.now += max(ksmd.next_wait(), 0.001)
        pages = int((clock.now - began) * 1000) - written
        space.write(BASE + written, *range(written + 1, written + pages + 1))
        written += pages
        ksmd.do_scan()
    assert space.pages_hashed > 8_000
    assert spent[0] < 1.2 * 10.0 * SHARE


def test_a_process_that_fills_its_memory_keeps_no_other_from_being_merged() -> None:
    clock, machine = Clock(), SimulatedMachine()
    ksmd = new_ksmd(clock)
    mover, others = filling(machine, 100), [process(machine, pid, list(SAME)) for pid in (101, 102)]
    for space in (mover, *others):
        ksmd.enter(space)
    run_for(ksmd, clock, 1.0, mover)
    assert not mover.pages_hashed
    assert ksmd.counters().pages_sharing == len(SAME)


def test_a_pass_that_left_a_process_out_says_nothing_of_its_pages() -> None:
    clock, machine = Clock(), SimulatedMachine()
    ksmd = new_ksmd(clock)
    spaces = [filling(machine, 100), process(machine, 101, list(SAME))]
    for space in spaces:
        ksmd.enter(space)
    while not spaces[0].pages_hashed:  # it rests, and is seen once
        run_for(ksmd, clock, 0.1)
    full_scans = ksmd.counters().full_scans
    spaces[0].write(1000, *range(1001, 1051))
    spaces[0].calls.clear()
    hashed = spaces[0].pages_hashed
    run_for(ksmd, clock, 3.0, spaces[0])
    assert spaces[0].pages_hashed == hashed
    assert not {"merge", "donate"} & set(spaces[0].calls)
    assert ksmd.counters().full_scans <= full_scans + 1


def test_what_was_named_is_merged_while_a_process_fills_other_memory() -> None:
    clock, machine = Clock(), SimulatedMachine()
    ksmd = new_ksmd(clock)
    spaces = [filling(machine, pid) for pid in (100, 101)]
    for space in spaces:
        ksmd.enter(space)
    run_for(ksmd, clock, 1.0, *spaces)
    for space in spaces:
        space.map_area(2 * BASE, 64)
        space.write(2 * BASE, *range(1001, 1065))
    run_for(ksmd, clock, 2.0, *spaces)
    assert ksmd.counters().pages_sharing == 64
    assert {space.pages_hashed for space in spaces} == {64}
    spaces[0].write(2 * BASE, 7)  # which is seen, too
    run_for(ksmd, clock, 2.0, *spaces)
    assert ksmd.counters().pages_sharing == 63


def test_what_was_named_counts_as_the_same_only_if_it_was_looked_at_twice() -> None:
    clock, machine = Clock(), SimulatedMachine()
    ksmd = new_ksmd(clock)
    spaces = [filling(machine, pid) for pid in (100, 101)]
    for space in spaces:
        space.map_area(2 * BASE, 64)
        ksmd.enter(space)
    for turn in range(40):  # it changes between any two looks
        for space in spaces:
            space.write(2 * BASE, *range(10_000 + 64 * turn, 10_064 + 64 * turn))
        run_for(ksmd, clock, GLANCE_SECONDS, *spaces)
    assert not ksmd.counters().pages_sharing


def test_looks_at_what_was_named_cost_no_more_than_their_share_where_all_of_it_is_hashed_each_time() -> None:
    clock, machine = Clock(), SimulatedMachine()
    ksmd = new_ksmd(clock)
    space = SimulatedAddressSpace(machine, 100, tracking=False)
    space.map_area(BASE, 20_000)
    space.write(BASE, *range(1, 20_001))
    space.stirred = Stirring(int(100 * MANY), 1 << 30, 0.0)
    ksmd.enter(space)
    run_for(ksmd, clock, 20.0, space)
    most = 20.0 * SHARE / FAULT_SECONDS
    assert 2 * 20_000 < space.pages_hashed < 1.2 * most + 2 * 20_000


def test_memory_that_stays_the_same_is_merged_although_its_processes_never_rest() -> None:
    clock, machine = Clock(), SimulatedMachine()
    ksmd = new_ksmd(clock)
    spaces = [filling(machine, pid) for pid in (100, 101)]
    ksmd.enter(spaces[0])
    run_for(ksmd, clock, MOST_SECONDS / 2, spaces[0])  # so they are never looked at in the same pass
    ksmd.enter(spaces[1])
    run_for(ksmd, clock, 2.2 * MOST_SECONDS, *spaces)
    assert ksmd.counters().pages_sharing == len(SAME)


@pytest.mark.parametrize("seed", range(4))
def test_the_books_agree_whatever_was_left_out(seed: int) -> None:
    rng, clock, machine, faults = random.Random(seed), Clock(), SimulatedMachine(), 0
    ksmd = new_ksmd(clock)
    spaces: dict[MmSlot, SimulatedAddressSpace] = {}
    for turn in range(150):
        if len(spaces) < 4 and rng.random() < 0.2:
            space = filling(machine, 100 + turn)
            space.map_area(2 * BASE, 64)
            spaces[ksmd.enter(space)] = space
        for slot, space in list(spaces.items()):
            faults += rng.choice([0, 0, MANY])
            space.stirred = Stirring(faults, rng.choice([1000, 1 << 30]), 0.0)
            here = [at for at in (BASE, 2 * BASE) if space._mergeable(at)]
            if rng.random() < 0.05:
                space.exit()
                del spaces[slot]
            elif here and rng.random() < 0.1:
                space.unmap(rng.choice(here), 64)
            elif here:
                space.write(rng.choice(here) + rng.randrange(40), *rng.choices(range(1, 20), k=20))
        for _ in range(rng.randrange(1, 6)):
            clock.now += rng.choice([0.02, 0.1, 1.0])
            ksmd.do_scan()
        if turn % 50 == 49:
            ksmd.unmerge()
        check(ksmd, machine, spaces)


@pytest.mark.parametrize("mode", ["none", "scan-time"])
def test_ksmd_leaves_nobody_out_if_it_is_told_how_much_to_look_at(mode: str) -> None:
    clock, machine = Clock(), SimulatedMachine()
    ksmd = new_ksmd(clock)
    ksmd.set("advisor_mode", mode)
    space = filling(machine, 100)
    ksmd.enter(space)
    run_for(ksmd, clock, 1.0, space)
    assert space.pages_hashed
