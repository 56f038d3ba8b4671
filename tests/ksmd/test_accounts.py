"""What ksmd keeps of processes and pages: how much, whether it is true, and that nothing is left of what is gone."""

from __future__ import annotations

import numpy as np
import pytest

from samepage.ksmd import Ksmd, PageState, books, counters
from samepage.ksmd.mm_slot import MmSlot, Structured
from samepage.ksmd.stable import SEGMENT_PAGES
from samepage.memory import (
    RUN,
    VPN_END,
    AddressSpaceGone,
    Donation,
    MergeResult,
    ScanFlag,
    ScanResult,
    Segment,
)
from samepage.memory.simulated import SimulatedAddressSpace
from samepage.memory.simulated_memory import SimulatedMachine
from tests.ksmd.simulation import BASE, SAME, Clock, check, new_ksmd, passes, process, processes


def test_two_hundred_joins_and_exits_leave_nothing_behind(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    processes(machine, ksmd, SAME)
    sizes = []
    for i in range(200):
        space = process(machine, 1000 + i, [*SAME, *range(2000 + i, 2100 + i)])
        slot = ksmd.enter(space)
        passes(ksmd, 2)
        if i % 2:
            space.exit()
            passes(ksmd, 1)
        else:
            ksmd.exit(slot)
            space.exit()
        passes(ksmd, 1)
        sizes.append((ksmd.counters().metadata_bytes, len(next(iter(ksmd.mm_list.domains())).rmap.columns[0])))
    assert max(sizes[100:]) <= max(sizes[:10])
    assert machine.saved == 0


def test_the_same_happens_every_time() -> None:
    logs = []
    for _ in range(2):
        machine, ksmd = SimulatedMachine(), new_ksmd()
        spaces, _ = processes(machine, ksmd, SAME, [*SAME, 0, 0], [7] * 20, hash_bits=5)
        passes(ksmd, 6)
        logs.append(([space.calls for space in spaces], ksmd.counters()))
    assert logs[0] == logs[1]


def test_rows_that_nobody_reads_are_not_made(
    machine: SimulatedMachine, ksmd: Ksmd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is a snapshot after every batch. With 400 processes most of what a batch took was rows for nobody."""
    made: list[int] = []
    make = counters.process_row

    def count(facts: counters.ProcessFacts) -> counters.ProcessRow:
        made.append(facts.slot.pid)
        return make(facts)

    monkeypatch.setattr(counters, "process_row", count)
    spaces, _ = processes(machine, ksmd, SAME, SAME, SAME)
    passes(ksmd, 4)
    assert not made
    before = ksmd.snapshot()
    spaces[0].write(BASE, 12345)
    passes(ksmd, 2)
    assert [row.merged for row in before.processes] == [len(SAME)] * 3  # of the moment it was taken, not of now
    assert ksmd.rows()[0].merged == len(SAME) - 1
    assert ksmd.rows() is ksmd.rows()
    assert len(made) == 6


def test_what_is_shown_is_not_copied_for_each_batch_and_true_whenever_it_is_read(
    machine: SimulatedMachine, ksmd: Ksmd, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[int] = []
    copy = counters.process_facts

    def count(slot: MmSlot) -> counters.ProcessFacts:
        copied.append(slot.pid)
        return copy(slot)

    monkeypatch.setattr(counters, "process_facts", count)
    spaces, slots = processes(machine, ksmd, SAME, SAME, SAME)
    passes(ksmd, 4)
    copied.clear()
    for _ in range(50):
        ksmd.do_scan()
    assert not copied
    assert [row.merged for row in ksmd.rows()] == [len(SAME)] * 3
    ksmd.exit(slots[0])
    assert [row.pid for row in ksmd.rows()] == [spaces[1].pid, spaces[2].pid]


def test_while_a_batch_goes_on_readers_are_shown_what_was_before_and_then_what_came_of_it(
    machine: SimulatedMachine, ksmd: Ksmd
) -> None:
    processes(machine, ksmd, SAME, SAME)
    passes(ksmd, 4)
    before = ksmd.counters()
    with ksmd.mutex:
        ksmd._is_stale = True  # as after a batch that was not shown
        assert ksmd.counters() is before
    ksmd.do_scan(0)  # somebody asked meanwhile
    with ksmd.mutex:
        assert ksmd.counters() is not before


def test_states_fit_their_column() -> None:
    assert max(PageState) < 256


def test_a_whole_gigabyte_takes_less_than_sixteen_bytes_a_page_and_one_extent_a_segment() -> None:
    """With the numbers of a real process, and no process behind them."""

    class Handle:
        def __init__(self, ino: int, npages: int) -> None:
            self.ino, self.npages = ino, npages

        def close(self) -> None: ...

    class Bulk(SimulatedAddressSpace):
        """Answers for so many pages at once, and agrees to everything."""

        inos = iter(range(1, 1 << 30))
        extents_merged = 0

        def scan(self, vpn: int, budget: int, flags: ScanFlag = ScanFlag.NONE, end: int = VPN_END) -> ScanResult:
            fresh = sums if not self.calls else sums[:0]
            self.calls.append("scan")
            runs = np.array([(BASE, len(fresh), 0, 0, 0)] if len(fresh) else [], RUN)
            return ScanResult(runs, fresh, 0, self._areas_seq, 0)

        def donate(self, runs: Structured) -> Donation:
            n = int(runs["npages"].sum())
            return Donation(Handle(next(self.inos), n), np.zeros(n, np.uint8))

        def merge(self, segment: Segment | None, extents: Structured) -> MergeResult:
            self.extents_merged += len(extents)
            return MergeResult(np.zeros(int(extents["npages"].sum()), np.uint8))

    n = 1 << 17
    sums = np.random.default_rng(1).integers(1, 1 << 63, n, dtype=np.uint64)
    machine, ksmd = SimulatedMachine(), new_ksmd()
    spaces = [Bulk(machine, pid) for pid in (1, 2)]
    for space in spaces:
        space.map_area(BASE, n)
        ksmd.enter(space)
    passes(ksmd, 2)
    assert ksmd.counters().pages_sharing == n
    assert [space.extents_merged for space in spaces] == [n // SEGMENT_PAGES] * 2
    assert ksmd.counters().metadata_bytes / (2 * n) < 15.7  # and the objects that stand for 64 segments are in it


def test_pages_merged_with_the_zero_page_can_be_recounted_at_any_time(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    (a, b), (slot, _) = processes(machine, ksmd, [0] * 100, [0] * 10)
    passes(ksmd, 2)
    ksmd.set("run", 0)
    rows = {row.pid: row.ksm_zero_pages for row in ksmd.rows()}
    assert rows == {a.pid: 100, b.pid: 10}
    a.write(BASE + 5, 1, 0, 2)
    a.unmap(BASE + 50, 50)
    hashed = a.pages_hashed
    ksmd.recount_zeros(slot)
    assert {row.pid: row.ksm_zero_pages for row in ksmd.rows()} == {a.pid: 47, b.pid: 10}
    assert ksmd.counters().ksm_zero_pages == 57
    assert a.pages_hashed == hashed
    check(ksmd, machine, {})
    ksmd.set("run", 1)
    passes(ksmd, 2)
    assert ksmd.rows()[0].ksm_zero_pages == 48


def test_where_there_are_many_pages_none_is_recounted(
    machine: SimulatedMachine, ksmd: Ksmd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("samepage.ksmd.look.RECOUNT_PAGES", 255)
    (a,), (slot,) = processes(machine, ksmd, [0] * 21)
    passes(ksmd, 2)
    a.write(BASE, 1)
    ksmd.recount_zeros(slot)
    assert ksmd.rows()[0].ksm_zero_pages == 21


def test_a_process_that_goes_while_it_is_recounted_is_dropped(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    (a,), (slot,) = processes(machine, ksmd, [0] * 10)
    passes(ksmd, 2)
    a.exit()
    ksmd.recount_zeros(slot)
    assert ksmd.rows() == ()


def test_where_segments_are_scarce_old_ones_are_retired_and_merging_goes_on(
    machine: SimulatedMachine, ksmd: Ksmd
) -> None:
    ksmd.slices.segments_max = 4
    (a, b), slots = processes(machine, ksmd, SAME, SAME)
    for n in range(2, 10):
        passes(ksmd, 3)
        assert len(a.merged_pages()) == len(b.merged_pages()) == 25 * n
        check_books(ksmd)
        assert sum(segment.is_open for segment in machine.segments.values()) <= 4
        for space in (a, b):
            space.write(BASE + 25 * n, *range(100 * n, 100 * n + 25))
    assert ksmd.slices.segments_retired > 0
    assert ksmd.unmerge(slots[0]).pages_remaining == 0
    assert not a.merged_pages()
    check_books(ksmd)


def check_books(ksmd: Ksmd) -> None:
    assert [books.problems(domain) for domain in ksmd.mm_list.domains()] == [[]]


def test_a_domain_whose_processes_all_turn_out_to_have_ended_is_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def verify(space: SimulatedAddressSpace) -> None:
        raise AddressSpaceGone("it ended", ended=True)

    clock = Clock()
    ksmd = new_ksmd(clock)
    machine = SimulatedMachine()
    processes(machine, ksmd, [5, 6, 7, 8], [5, 6, 7, 8])
    while not any(domain.candidates for domain in ksmd.mm_list.domains()):
        clock.now += ksmd.next_wait()
        ksmd.do_scan()
    monkeypatch.setattr(SimulatedAddressSpace, "verify", verify)
    clock.now += 60.0
    for _ in range(5):
        ksmd.do_scan()
    assert ksmd.rows() == ()
