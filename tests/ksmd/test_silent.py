"""A process that cannot answer (`AddressSpaceSilent`) is asked nothing until it can, and nothing of it is forgotten."""

from __future__ import annotations

import errno

import pytest

from samepage.ksmd import Ksmd, UnmergeFailed
from samepage.ksmd.mm_slot import MmSlot
from samepage.memory import AddressSpaceSilent
from samepage.memory.simulated import SimulatedAddressSpace
from samepage.memory.simulated_memory import SimulatedMachine
from tests.ksmd.simulation import BASE, check, new_ksmd, passes, process, processes

N = 40
CONTENTS = range(1, N + 1)


def three(ksmd: Ksmd, machine: SimulatedMachine) -> tuple[list[SimulatedAddressSpace], list[MmSlot]]:
    return processes(machine, ksmd, CONTENTS, CONTENTS, CONTENTS)


def merged(spaces: list[SimulatedAddressSpace]) -> list[int]:
    return [len(space.merged_pages()) for space in spaces]


@pytest.mark.parametrize("looks", range(3))
def test_others_are_merged_meanwhile_and_it_is_as_soon_as_it_answers(looks: int) -> None:
    ksmd, machine = new_ksmd(), SimulatedMachine()
    spaces, slots = three(ksmd, machine)
    passes(ksmd, looks)
    spaces[0].halt = "stopped"
    passes(ksmd, 3)
    if looks < 2:  # else they were merged before
        assert merged(spaces) == [0, N, N]
    assert [row.state for row in ksmd.rows()] == ["stopped", "running", "running"]
    check(ksmd, machine, dict(zip(slots, spaces, strict=True)))
    asked = len(spaces[0].calls)
    passes(ksmd, 3)
    assert len(spaces[0].calls) == asked
    spaces[0].halt = ""
    passes(ksmd, 4)
    assert merged(spaces) == [N, N, N]
    assert {row.state for row in ksmd.rows()} == {"running"}
    check(ksmd, machine, dict(zip(slots, spaces, strict=True)))


@pytest.mark.parametrize("what", ["donate", "merge", "map_count", "headroom", "areas", "scan"])
@pytest.mark.parametrize("who", range(3))
def test_one_that_falls_silent_in_the_middle_of_merging_keeps_its_candidates(
    monkeypatch: pytest.MonkeyPatch, what: str, who: int
) -> None:
    ksmd, machine = new_ksmd(), SimulatedMachine()
    ksmd.set("max_overcommit", 100)
    spaces, slots = three(ksmd, machine)
    original = spaces[who]._called

    def called(asked: str) -> None:
        if asked == what and len(spaces[who].calls) > 2:
            spaces[who].halt = "stopped"
        original(asked)

    monkeypatch.setattr(spaces[who], "_called", called)
    passes(ksmd, 4)
    others = [space for space in spaces if space is not spaces[who]]
    assert merged(others) == [N, N]
    check(ksmd, machine, dict(zip(slots, spaces, strict=True)))
    monkeypatch.undo()
    spaces[who].halt = ""
    passes(ksmd, 8)
    assert merged(spaces) == [N, N, N]
    check(ksmd, machine, dict(zip(slots, spaces, strict=True)))


def test_run_2_is_an_error_and_what_it_did_not_reach_is_unmerged_at_its_first_answer() -> None:
    ksmd, machine = new_ksmd(), SimulatedMachine()
    spaces, slots = three(ksmd, machine)
    passes(ksmd, 3)
    spaces[1].halt = "frozen"
    with pytest.raises(UnmergeFailed) as failed:
        ksmd.set("run", 2)
    assert failed.value.errno == errno.ETIMEDOUT
    rows = {row.pid: row for row in failed.value.result.processes if row.errno}
    assert [(row.pid, row.state, row.pages_remaining) for row in rows.values()] == [(spaces[1].pid, "frozen", N)]
    assert ksmd.get("run") == "0"
    assert merged(spaces) == [0, N, 0]
    assert [row.unmerge_pending for row in ksmd.rows()] == [False, True, False]
    assert ksmd.next_wait() < 1
    assert ksmd.do_scan() == 0
    spaces[1].halt = ""
    assert ksmd.do_scan() == 0
    assert merged(spaces) == [0, 0, 0]
    assert not any(row.unmerge_pending for row in ksmd.rows())
    assert ksmd.next_wait() == float("inf")
    check(ksmd, machine, dict(zip(slots, spaces, strict=True)))
    ksmd.set("run", 1)
    passes(ksmd, 3)
    assert merged(spaces) == [N, N, N]


def test_run_1_takes_back_what_run_2_left_but_not_what_was_asked_for_by_name() -> None:
    ksmd, machine = new_ksmd(), SimulatedMachine()
    spaces, slots = three(ksmd, machine)
    passes(ksmd, 3)
    for space in spaces[:2]:
        space.halt = "stopped"
    assert ksmd.unmerge(slots[0]).errno == errno.ETIMEDOUT
    with pytest.raises(UnmergeFailed):
        ksmd.set("run", 2)
    ksmd.set("run", 1)
    for space in spaces[:2]:
        space.halt = ""
    passes(ksmd, 1)
    assert merged(spaces)[:2] == [0, N]


def test_one_that_is_known_to_have_nothing_merged_is_no_error() -> None:
    ksmd, machine = new_ksmd(), SimulatedMachine()
    spaces, _ = processes(machine, ksmd, CONTENTS, CONTENTS, range(1000, 1000 + N))
    passes(ksmd, 3)
    spaces[2].halt = "stopped"
    ksmd.set("run", 2)
    assert ksmd.get("run") == "2"
    new = process(machine, 200, CONTENTS)  # what it has is not known
    new.halt = "stopped"
    ksmd.enter(new)
    assert ksmd.unmerge().errno == errno.ETIMEDOUT


def test_a_break_that_is_to_be_tried_again_is_not_forgotten_when_the_process_falls_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ksmd, machine = new_ksmd(), SimulatedMachine()
    spaces, slots = three(ksmd, machine)
    passes(ksmd, 3)
    spaces[0].script = lambda what, vpn: errno.ENOMEM if what == "break" else None
    assert ksmd.unmerge(slots[0]).errno == errno.ENOMEM
    spaces[0].script = None
    original = spaces[0]._called

    def called(asked: str) -> None:
        if asked == "break":
            raise AddressSpaceSilent(spaces[0].pid, "stopped")
        original(asked)

    monkeypatch.setattr(spaces[0], "_called", called)
    passes(ksmd, 4)
    monkeypatch.undo()
    passes(ksmd, 70)
    assert merged(spaces)[0] == 0
    assert spaces[0].read(BASE) == 1


def test_a_mistake_about_one_that_is_silent_keeps_nobody_else_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    ksmd, machine = new_ksmd(), SimulatedMachine()
    spaces, _ = three(ksmd, machine)
    spaces[0].halt = "stopped"
    passes(ksmd, 1)

    def mistaken() -> str:
        raise ValueError("not enough values to unpack")

    monkeypatch.setattr(spaces[0], "catch_up", mistaken)
    passes(ksmd, 3)
    assert merged(spaces) == [0, N, N]
