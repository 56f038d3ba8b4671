"""Pages that were merged and then written are restored once the writing has come to an end, and merged again."""

from __future__ import annotations

import pytest

from samepage.ksmd import Ksmd, islands
from samepage.ksmd.islands import PATIENCE_MAX, QUIET_PASSES, RUN_PAGES
from samepage.ksmd.mm_slot import MmSlot
from samepage.memory import PageStatus
from samepage.memory.simulated import SimulatedAddressSpace
from samepage.memory.simulated_memory import SimulatedMachine
from tests.ksmd.simulation import BASE, check, new_ksmd, passes, processes

N = 2 * RUN_PAGES
WEIGHTS = range(100, 100 + N)


def overwritten(ksmd: Ksmd, machine: SimulatedMachine) -> tuple[list[SimulatedAddressSpace], list[MmSlot]]:
    """Two processes whose pages were merged, and then overwritten with equal data."""
    spaces, slots = processes(machine, ksmd, range(1, N + 1), range(1, N + 1), rehash_broken=False)
    passes(ksmd, 3)
    assert all(len(space.merged_pages()) == N for space in spaces)
    for space in spaces:
        space.write(BASE, *WEIGHTS)
    return spaces, slots


def restores(space: SimulatedAddressSpace) -> int:
    return space.calls.count("restore")


def test_what_was_overwritten_is_merged_again() -> None:
    ksmd, machine = new_ksmd(), SimulatedMachine()
    spaces, slots = overwritten(ksmd, machine)
    passes(ksmd, QUIET_PASSES + 12)
    assert all(len(space.merged_pages()) == N for space in spaces)
    assert [space.read(BASE + i) for space in spaces for i in range(N)] == [*WEIGHTS, *WEIGHTS]
    check(ksmd, machine, dict(zip(slots, spaces, strict=True)))


def test_pages_that_somebody_holds_are_asked_about_ever_more_rarely_until_they_let_go() -> None:
    ksmd, machine = new_ksmd(), SimulatedMachine()
    spaces, _ = overwritten(ksmd, machine)
    spaces[0].pinned = set(range(BASE, BASE + N))
    passes(ksmd, 100)
    assert not spaces[0].merged_pages()
    assert 3 < restores(spaces[0]) < 12
    spaces[0].pinned = set()
    passes(ksmd, PATIENCE_MAX + 4)
    assert all(len(space.merged_pages()) == N for space in spaces)


def test_short_runs_are_not_worth_a_mapping_unless_their_owner_merges_them() -> None:
    ksmd, machine = new_ksmd(), SimulatedMachine()
    spaces, slots = processes(machine, ksmd, range(1, N + 1), range(1, N + 1), rehash_broken=False)
    passes(ksmd, 3)
    for space in spaces:
        for i in range(0, N, 2):
            space.write(BASE + i, 1000 + i)
    passes(ksmd, 20)
    assert [restores(space) for space in spaces] == [0, 0]
    for slot in slots:
        ksmd.merge_range(slot, BASE, N)
    ksmd.merge_range(slots[0], BASE, N)
    assert all(len(space.merged_pages()) == N for space in spaces)


def test_one_pass_restores_no_more_than_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(islands, "BATCH_PAGES", RUN_PAGES)
    ksmd, machine = new_ksmd(), SimulatedMachine()
    spaces, _ = overwritten(ksmd, machine)
    passes(ksmd, QUIET_PASSES + 12)
    assert [restores(space) for space in spaces] == [N // RUN_PAGES] * 2
    assert all(len(space.merged_pages()) == N for space in spaces)


def test_a_child_that_joins_tells_of_what_its_parent_had_overwritten() -> None:
    ksmd, machine = new_ksmd(), SimulatedMachine()
    spaces, _ = overwritten(ksmd, machine)
    child = spaces[0].fork(9)
    spaces[0].exit()
    ksmd.enter(child)
    passes(ksmd, QUIET_PASSES + 12)
    assert len(child.merged_pages()) == N


def test_after_an_unmerge_nothing_is_known_to_be_broken_that_is_not() -> None:
    ksmd, machine = new_ksmd(), SimulatedMachine()
    spaces, slots = overwritten(ksmd, machine)
    spaces[0].script = lambda what, vpn: PageStatus.BUSY if what == "restore" else None
    passes(ksmd, 10)
    ksmd.set("run", 2)
    spaces[0].script = None
    ksmd.set("run", 1)
    passes(ksmd, PATIENCE_MAX + 4)
    assert all(len(space.merged_pages()) == N for space in spaces)
    check(ksmd, machine, dict(zip(slots, spaces, strict=True)))
