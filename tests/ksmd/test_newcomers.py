"""What a process that joins costs does not grow with the number of the others."""

from __future__ import annotations

import itertools

import pytest

from samepage.arrays import Ints
from samepage.ksmd import Ksmd
from samepage.ksmd.pieces import Pieces
from samepage.memory.simulated_memory import SimulatedMachine
from tests.ksmd.simulation import BASE, SAME, Clock, check, passes, process, processes


def costly(clock: Clock) -> Ksmd:
    """A ksmd whose every batch is dear, so that looks at all are rarely due."""
    spent = itertools.count()
    return Ksmd(clock=clock, cpu_clock=lambda: 0.01 * next(spent))


def test_who_joins_before_looks_at_all_are_due_is_looked_at_alone() -> None:
    clock, machine = Clock(), SimulatedMachine()
    ksmd = costly(clock)
    spaces, _ = processes(machine, ksmd, *(range(i, i + 50) for i in range(1, 500, 50)))
    for _ in range(20):
        clock.now += ksmd.next_wait()
        ksmd.do_scan()
    for space in spaces:
        space.calls.clear()
    scans = ksmd.counters().full_scans
    for pid in range(300, 310):
        slot = ksmd.enter(process(machine, pid, range(pid, pid + 50)))
        assert ksmd.next_wait() == 0
        ksmd.do_scan()
        assert slot.passes == 1
        assert ksmd.next_wait() >= 0.02
        ksmd.exit(slot)
    looks = sum(space.calls.count("scan") for space in spaces)
    assert looks == (ksmd.counters().full_scans - scans) * len(spaces) <= len(spaces)


def test_who_was_looked_at_alone_is_merged_after_one_whole_pass() -> None:
    clock, machine = Clock(), SimulatedMachine()
    ksmd = costly(clock)
    (first,), _ = processes(machine, ksmd, SAME)
    for _ in range(20):
        clock.now += ksmd.next_wait()
        ksmd.do_scan()
    ksmd.do_scan()  # not due yet, so afterwards looks at all are not for a while
    scans = ksmd.counters().full_scans
    space = process(machine, 300, SAME)
    slot = ksmd.enter(space)
    ksmd.do_scan()
    assert (ksmd.counters().full_scans, slot.passes) == (scans, 1)
    space.write(BASE, 99)
    while not machine.saved:
        clock.now += ksmd.next_wait()
        ksmd.do_scan()
    assert ksmd.counters().full_scans == scans + 1
    assert machine.saved == len(SAME) - 1
    check(ksmd, machine, {slot: space, ksmd.slots(first.pid)[0]: first})


def test_pages_of_a_fork_are_looked_up_in_no_more_processes_however_many_there_are(
    machine: SimulatedMachine, ksmd: Ksmd, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up = 0
    refs_of = Pieces.refs_of

    def counted(pieces: Pieces, vpns: Ints) -> Ints:
        nonlocal looked_up
        looked_up += len(vpns)
        return refs_of(pieces, vpns)

    (a, _), _ = processes(machine, ksmd, SAME, SAME)
    passes(ksmd, 2)
    monkeypatch.setattr(Pieces, "refs_of", counted)
    asked = []
    for pid in range(300, 320):
        looked_up = 0
        ksmd.enter(a.fork(pid))
        passes(ksmd, 1)
        asked.append(looked_up)
    assert asked[0] == asked[-1] > 0
    assert ksmd.counters().pages_inherited == 20 * len(SAME)
