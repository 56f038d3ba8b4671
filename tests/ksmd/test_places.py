"""A process that belongs in another merge domain by now takes nothing of the old one along."""

from __future__ import annotations

import errno

import pytest

from samepage.ksmd.mm_slot import WHOLE, Owed
from samepage.ksmd.places import PLACE_SECONDS
from samepage.memory.simulated_memory import SimulatedMachine
from tests.ksmd.simulation import SAME, Clock, check, new_ksmd, passes, processes

N = len(SAME)


@pytest.mark.parametrize("run", ["1", "0"])
def test_it_is_unmerged_and_then_let_go_of_and_others_stay_merged(run: str) -> None:
    clock, machine = Clock(), SimulatedMachine()
    ksmd = new_ksmd(clock)
    (a, b, c), (slot, *_) = processes(machine, ksmd, SAME, SAME, SAME)
    passes(ksmd, 3)
    assert len(a.merged_pages()) == N
    ksmd.set("run", run)
    a.elsewhere = "it belongs in merge domain x now"
    clock.now += PLACE_SECONDS
    ksmd.do_scan()
    assert (len(a.merged_pages()), len(b.merged_pages()), len(c.merged_pages())) == (0, N, N)
    assert (slot.gone, slot.lost, slot.owed) == (True, "it belongs in merge domain x now", [])
    assert [row.pid for row in ksmd.rows()] == [b.pid, c.pid]
    assert not ksmd.mm_list.lost.rows()


def test_it_is_noticed_at_once_when_the_rules_change_and_before_pages_are_matched() -> None:
    clock, machine = Clock(), SimulatedMachine()
    ksmd = new_ksmd(clock)
    (a, b), _ = processes(machine, ksmd, SAME, SAME)
    passes(ksmd, 3)
    a.elsewhere = "elsewhere"
    ksmd.do_scan()
    assert len(a.merged_pages()) == N
    ksmd.look_again()
    ksmd.do_scan()
    assert not a.merged_pages()

    machine, clock = SimulatedMachine(), Clock()
    ksmd = new_ksmd(clock)
    (a, b), _ = processes(machine, ksmd, SAME, SAME)
    while not any(domain.candidates for domain in ksmd.mm_list.domains()):
        ksmd.do_scan()
    a.elsewhere = "elsewhere"
    clock.now += 1.5
    passes(ksmd, 3)
    assert "donate" not in a.calls + b.calls


def test_without_the_memory_it_leaves_all_the_same_and_owes_the_rest() -> None:
    clock, machine = Clock(), SimulatedMachine()
    ksmd = new_ksmd(clock)
    (a, _), (slot, _) = processes(machine, ksmd, SAME, SAME)
    passes(ksmd, 3)
    machine.limit = machine.used + 20
    a.elsewhere = "elsewhere"
    ksmd.look_again()
    ksmd.do_scan()
    assert len(a.merged_pages()) == N - 20
    assert slot.lost == f"elsewhere; {N - 20} of its pages stay merged: ENOMEM"
    (row,) = ksmd.mm_list.lost.rows()
    assert (row.pid, row.pages_remaining) == (a.pid, N - 20)
    assert ksmd.mm_list.lost.forget(a.pid) == [Owed(*WHOLE, leave_alone=True)]


def test_one_that_is_stopped_is_seen_off_when_it_goes_on() -> None:
    clock, machine = Clock(), SimulatedMachine()
    ksmd = new_ksmd(clock)
    spaces, slots = processes(machine, ksmd, SAME, SAME)
    passes(ksmd, 3)
    spaces[0].halt = "stopped"
    ksmd.do_scan()
    spaces[0].elsewhere = "elsewhere"
    ksmd.look_again()
    for _ in range(3):
        clock.now += PLACE_SECONDS
        ksmd.do_scan()
    check(ksmd, machine, dict(zip(slots, spaces, strict=True)))
    assert len(spaces[0].merged_pages()) == N
    spaces[0].halt = ""
    for _ in range(3):
        clock.now += PLACE_SECONDS
        ksmd.do_scan()
    assert not spaces[0].merged_pages()
    assert slots[0].gone


def test_a_long_unmerge_lets_others_in_between_and_nothing_is_merged_meanwhile() -> None:
    clock, machine = Clock(), SimulatedMachine()
    ksmd = new_ksmd(clock)
    contents = list(range(1, 201))
    (a, _), (slot, _) = processes(machine, ksmd, contents, contents)
    passes(ksmd, 3)
    assert len(a.merged_pages()) == len(contents)

    def script(what: str, vpn: int) -> None:
        if what == "break":
            clock.now += 0.05

    a.script = script
    a.elsewhere = "elsewhere"
    ksmd.look_again()
    batches = 0
    while not slot.gone:
        ksmd.do_scan()
        assert ksmd.next_wait() <= 1
        a.calls.clear()
        batches += 1
        assert batches < 50
    assert batches > 1
    assert not a.merged_pages()
    assert "merge" not in a.calls


def test_many_that_leave_at_once_keep_nobody_waiting_for_all_of_them() -> None:
    clock, machine = Clock(), SimulatedMachine()
    ksmd = new_ksmd(clock)
    spaces, slots = processes(machine, ksmd, *[SAME] * 20)
    passes(ksmd, 3)

    def script(what: str, vpn: int) -> None:
        if what == "break":
            clock.now += 0.005

    for space in spaces:
        space.script, space.elsewhere = script, "elsewhere"
    ksmd.set("run", "0")
    ksmd.look_again()
    batches = 0
    while not all(slot.gone for slot in slots):
        began = clock.now
        ksmd.do_scan()
        assert clock.now - began < 2
        assert ksmd.next_wait() <= 1 or not ksmd.slots()
        batches += 1
        assert batches < 50
    assert batches > 2
    assert not any(space.merged_pages() for space in spaces)


def test_a_mistake_about_one_process_keeps_nobody_from_being_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, ksmd = SimulatedMachine(), new_ksmd(Clock())
    (a, b, c), (slot, *_) = processes(machine, ksmd, SAME, SAME, SAME)

    def mistake() -> str:
        raise RecursionError

    monkeypatch.setattr(a, "misplaced", mistake)
    passes(ksmd, 3)
    assert slot.gone
    assert (len(a.merged_pages()), len(b.merged_pages()), len(c.merged_pages())) == (0, N, N)


def test_an_error_of_one_page_keeps_nobody_in_the_domain() -> None:
    machine = SimulatedMachine()
    ksmd = new_ksmd(Clock())
    (a, _), (slot, _) = processes(machine, ksmd, SAME, SAME)
    passes(ksmd, 3)
    bad = min(a.merged_pages())
    a.script = lambda what, vpn: errno.EFAULT if (what, vpn) == ("break", bad) else None
    a.elsewhere = "elsewhere"
    ksmd.look_again()
    ksmd.do_scan()
    assert slot.gone
    assert len(a.merged_pages()) <= 1
