"""Nobody keeps ksmd from the others: neither by being slow, nor by answers that hardly get on, nor by claims."""

from __future__ import annotations

import time
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from samepage.ksmd import Ksmd, books, quota
from samepage.ksmd import mm_slot as slots
from samepage.ksmd.look import STEP_MIN
from samepage.ksmd.patience import Patience
from samepage.memory import (
    RUN,
    VPN_END,
    AddressSpaceGone,
    BreakResult,
    MergeResult,
    RunKind,
    ScanFlag,
    ScanResult,
    Segment,
)
from samepage.memory.check import AREA_PAGES_MAX
from samepage.memory.conversation import TIMEOUT
from samepage.memory.simulated import SimulatedAddressSpace
from samepage.memory.simulated_memory import SimulatedMachine
from samepage.process.merge_domain import MergeDomain
from tests.ksmd.simulation import BASE, Clock, new_ksmd, passes, process, processes

SAME = range(1, 51)


class Slow(SimulatedAddressSpace):
    """Takes its time for every look, and gets on by one page."""

    takes = 0.0
    looks = 0

    def scan(self, vpn: int, budget: int, flags: ScanFlag = ScanFlag.NONE, end: int = VPN_END) -> ScanResult:
        time.sleep(self.takes)
        self.looks += 1
        at = max(vpn, BASE)
        return ScanResult(
            np.empty(0, RUN), np.empty(0, np.uint64), at + 1 if at < BASE + 9999 else 0, self._areas_seq, 0
        )


def slow(machine: SimulatedMachine, pid: int, takes: float, domain: int = 0) -> Slow:
    space = Slow(machine, pid, domain=domain)
    space.takes = takes
    space.map_area(BASE, 10_000)
    return space


def test_an_account_fills_up_again_but_not_beyond_what_it_held() -> None:
    clock = Clock()
    patience = Patience(10.0, 0.1, clock)
    patience.spend(11.0)
    assert patience.is_spent
    assert not patience.is_at_an_end
    clock.now += 20
    assert not patience.is_spent
    clock.now += 1000
    patience.spend(20.5)
    assert patience.is_at_an_end


def test_a_scan_that_advances_a_page_at_a_time_is_given_up() -> None:
    machine, ksmd = SimulatedMachine(), new_ksmd()
    crawling = ksmd.enter(slow(machine, 666, 0.0))
    (a, b), _ = processes(machine, ksmd, SAME, SAME)
    passes(ksmd, 3)
    assert crawling.gone
    assert "hardly gets on" in crawling.lost
    assert len(a.merged_pages()) == len(b.merged_pages()) == 50


def test_merging_on_request_is_not_kept_by_it_either() -> None:
    machine, ksmd = SimulatedMachine(), new_ksmd()
    crawling = slow(machine, 666, 0.0)
    slot = ksmd.enter(crawling)
    with pytest.raises(AddressSpaceGone, match="hardly gets on"):
        ksmd.merge_range(slot, 0, 1 << 40)


class Dawdling(SimulatedAddressSpace):
    """Is just in time with every merge."""

    def merge(self, segment: Segment | None, extents: np.ndarray) -> MergeResult:
        time.sleep(0.09)
        return super().merge(segment, extents)


def test_nobody_waits_for_a_guest_whose_pages_are_in_many_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samepage.ksmd.slices.FOREIGN_SLICE_SECONDS", 0.2)
    machine, ksmd = SimulatedMachine(), Ksmd(owner=0)
    for content in range(1, 21):
        for n in range(2):
            ksmd.enter(process(machine, 2 * content + n, [content], domain=1))
        passes(ksmd, 3)
    dawdling = Dawdling(machine, 666, domain=1)
    dawdling.map_area(BASE, 20)
    dawdling.write(BASE, *range(1, 21))
    ksmd.enter(dawdling)
    longest = 0.0
    ends = time.monotonic() + 20
    while len(dawdling.merged_pages()) < 20 and time.monotonic() < ends:  # the rest have their turn later
        began = time.monotonic()
        ksmd.do_scan()
        longest = max(longest, time.monotonic() - began)
    assert len(dawdling.merged_pages()) == 20
    assert longest < 1.0  # not two seconds


class Hollow(SimulatedAddressSpace):
    """Gets on, by a little, and has nothing to tell."""

    clock: Clock

    def scan(self, vpn: int, budget: int, flags: ScanFlag = ScanFlag.NONE, end: int = VPN_END) -> ScanResult:
        self.clock.now += 0.01
        after = max(vpn, BASE) + STEP_MIN
        return ScanResult(np.empty(0, RUN), np.empty(0, np.uint64), after, self._areas_seq, 0)


@pytest.mark.parametrize(
    ("domain", "error", "seconds"), [(0, "keeps everybody waiting", 25), (1, "kept waiting for too long", 11)]
)
def test_merging_on_request_does_not_go_on_for_ever(domain: int, error: str, seconds: float) -> None:
    machine, clock = SimulatedMachine(), Clock()
    ksmd = Ksmd(owner=0, clock=clock, cpu_clock=lambda: 0.0)
    space = Hollow(machine, 666, domain=domain)
    space.clock = clock
    space.map_area(BASE, 1 << 20)
    slot = ksmd.enter(space)
    began = clock.now
    with pytest.raises(OSError, match=error):
        ksmd.merge_range(slot, 0, 1 << 40)
    assert clock.now - began < seconds


def test_a_process_that_is_slow_is_put_off_and_one_that_stays_so_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "A_MOMENT", 0.001)
    machine, ksmd = SimulatedMachine(), Ksmd()
    dawdling = ksmd.enter(slow(machine, 666, 0.15))
    dawdling.patience = Patience(0.2, 0.0)
    dawdling.domain.patience = Patience(1000.0, 0.0)
    (a, b), _ = processes(machine, ksmd, SAME, SAME, domain=1)
    began = time.monotonic()
    while len(a.merged_pages()) < 50 and time.monotonic() - began < 10:
        ksmd.do_scan()
    assert len(a.merged_pages()) == len(b.merged_pages()) == 50
    assert dawdling.patience.is_spent
    held = time.monotonic()
    for _ in range(10):
        ksmd.do_scan()  # and does not ask it
    assert time.monotonic() - held < 0.15
    dawdling.patience.spend(1.0)
    with pytest.raises(AddressSpaceGone, match="keeps everybody waiting"):
        ksmd.merge_range(dawdling, BASE, 100)
    assert ksmd.slots(666) == []


@pytest.mark.parametrize("owner", [0, 5])
def test_that_the_owners_processes_had_no_cpu_is_not_held_against_them(owner: int) -> None:
    """Guests may keep their own processes from a CPU."""
    machine, ksmd = SimulatedMachine(), Ksmd(owner=owner)
    starved = process(machine, 1, domain=5)
    slot = ksmd.enter(starved)
    slot.domain.patience = slot.patience = Patience(1.0, 0.0)
    starved.without_cpu = 3.0
    slot.kept_waiting(3.1)
    assert slot.is_put_off == (owner != 5)
    slot.kept_waiting(1.1)  # nothing kept it
    assert slot.is_put_off


class Laborious(SimulatedAddressSpace):
    """Breaks as many pages a second as a disk at its worst takes, and is not waited for longer than a process is."""

    clock: Clock

    def break_ksm(self, vpn: int, npages: int) -> BreakResult:
        result = super().break_ksm(vpn, npages)
        took = 0.01 * result.pages_unmerged
        self.clock.now += took
        if took > TIMEOUT:
            raise AddressSpaceGone("no answer in time")
        return result


@pytest.mark.parametrize("known", [True, False])
def test_an_unmerge_that_gets_on_slowly_comes_to_its_end(monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    """Also of pages that were merged before the service knew of the process."""
    machine, clock = SimulatedMachine(), Clock()
    monkeypatch.setattr(slots, "time", SimpleNamespace(monotonic=clock))
    spaces = [Laborious(machine, pid) for pid in (1, 2)]
    for space in spaces:
        space.clock = clock
        space.map_area(BASE, 6000)
        space.write(BASE, *range(1, 6001))
    ksmd = new_ksmd(clock)
    for space in spaces:
        ksmd.enter(space)
    passes(ksmd, 3)
    assert len(spaces[0].merged_pages()) == 6000
    if not known:
        ksmd = new_ksmd(clock)
        ksmd.enter(spaces[0])
    began = clock.now
    outcome = ksmd.unmerge(ksmd.slots(1)[0])
    assert (outcome.errno, outcome.pages_unmerged, outcome.pages_remaining) == (0, 6000, 0)
    assert clock.now - began < 61
    assert ksmd.slots(1), "it keeps everybody waiting"


def test_processes_that_join_again_and_again_share_one_account() -> None:
    machine, ksmd = SimulatedMachine(), new_ksmd()
    first = ksmd.enter(process(machine, 1))
    first.domain.patience.spend(1000.0)
    (a, _), _ = processes(machine, ksmd, SAME, SAME)
    (c, _), _ = processes(machine, ksmd, SAME, SAME, domain=1)
    for _ in range(20):
        ksmd.do_scan()
    assert not a.merged_pages()
    assert len(c.merged_pages()) == 50


def test_who_leaves_and_joins_again_finds_the_account_as_it_was_and_so_do_other_namespaces() -> None:
    machine, ksmd = SimulatedMachine(), new_ksmd()
    slot = ksmd.enter(process(machine, 1, domain=7))
    slot.domain.patience.spend(1000.0)
    ksmd.exit(slot)
    ksmd.do_scan()
    for n, key in enumerate((MergeDomain(7), MergeDomain(7, 12345))):  # a user in a user namespace
        assert ksmd.enter(process(machine, 2 + n, domain=key)).is_put_off


def test_all_users_but_the_owner_have_one_account_together() -> None:
    machine, ksmd = SimulatedMachine(), Ksmd(owner=0)
    for user in (1, 2):
        ksmd.enter(process(machine, user, domain=user)).domain.patience.spend(6.0)
    assert ksmd.enter(process(machine, 3, domain=3)).is_put_off
    assert not ksmd.enter(process(machine, 4, domain=0)).is_put_off


def test_the_owner_does_not_wait_for_the_processes_of_others() -> None:
    """Whose every look takes a moment that costs nobody anything."""
    machine, ksmd = SimulatedMachine(), Ksmd(owner=0)
    others = [slow(machine, 666 + n, 0.05, domain=1) for n in range(8)]
    for other in others:
        ksmd.enter(other)
    (a, b), _ = processes(machine, ksmd, SAME, SAME)
    began = time.monotonic()
    while len(a.merged_pages()) < 50 and time.monotonic() - began < 10:
        ksmd.do_scan()
    assert len(a.merged_pages()) == len(b.merged_pages()) == 50
    assert time.monotonic() - began < 3.0
    for _ in range(40):
        ksmd.do_scan()
    assert all(other.looks for other in others)  # they have their turn all the same


class Claiming(SimulatedAddressSpace):
    """Claims pages, each in another row block than the last."""

    kind = RunKind.HASHED

    def scan(self, vpn: int, budget: int, flags: ScanFlag = ScanFlag.NONE, end: int = VPN_END) -> ScanResult:
        at = max(vpn, BASE)
        n = min(budget, 4000)
        runs = np.zeros(n, RUN)
        runs["vpn"], runs["npages"], runs["kind"] = at + 512 * np.arange(n), 1, self.kind
        runs["ino"], runs["offset"] = 7, 5
        sums = np.arange(1, n + 1, dtype=np.uint64) if self.kind == RunKind.HASHED else np.empty(0, np.uint64)
        after = at + 512 * n
        return ScanResult(runs, sums, after if after < BASE + (1 << 27) else 0, self._areas_seq, 0)


@pytest.mark.parametrize("kind", [RunKind.HASHED, RunKind.FOUND])
def test_claims_of_pages_all_over_the_place_take_bounded_memory(monkeypatch: pytest.MonkeyPatch, kind: RunKind) -> None:
    monkeypatch.setattr(quota, "RESIDENT_MAX", 8 << 20)
    machine, ksmd = SimulatedMachine(), Ksmd()
    claiming = Claiming(machine, 666)
    claiming.kind = kind
    claiming.map_area(BASE, (1 << 27) + (1 << 22))
    slot = ksmd.enter(claiming)
    ksmd.do_scan(20_000)
    assert not slot.gone, slot.lost
    assert ksmd.counters().metadata_bytes < 32 << 20
    (a, b), _ = processes(machine, ksmd, SAME, SAME, domain=1)
    passes(ksmd, 3)
    assert len(a.merged_pages()) == len(b.merged_pages()) == 50
    assert [books.problems(d) for d in ksmd.mm_list.domains()] == [[], []]


class Boasting(SimulatedAddressSpace):
    """Says of two billion pages at once that they are gone, broken or merged."""

    kind = RunKind.GONE

    def pages_max(self) -> int:
        return 1000

    def scan(self, vpn: int, budget: int, flags: ScanFlag = ScanFlag.NONE, end: int = VPN_END) -> ScanResult:
        if vpn > BASE:
            return ScanResult(np.empty(0, RUN), np.empty(0, np.uint64), 0, self._areas_seq, 0)
        runs = np.zeros(2, RUN)
        runs["vpn"], runs["npages"], runs["kind"] = (BASE, BASE + 4), (4, BOAST - 4), (RunKind.HASHED, self.kind)
        runs["ino"] = 7
        return ScanResult(runs, np.arange(4, dtype=np.uint64), BASE + BOAST, self._areas_seq, 0)


BOAST = AREA_PAGES_MAX


def test_a_process_cannot_have_more_broken_pages_than_it_has_pages() -> None:
    machine, ksmd = SimulatedMachine(), new_ksmd()
    boasting = Boasting(machine, 666)
    boasting.kind = RunKind.BROKEN
    boasting.map_area(BASE, BOAST)
    slot = ksmd.enter(boasting)
    ksmd.do_scan()
    assert "more pages than it has" in slot.lost


@pytest.mark.parametrize("kind", [RunKind.GONE, RunKind.FOUND])
def test_what_is_done_with_a_long_run_follows_from_what_is_known_of_it(kind: RunKind) -> None:
    machine, ksmd = SimulatedMachine(), new_ksmd()
    boasting = Boasting(machine, 666)
    boasting.kind = kind
    boasting.map_area(BASE, BOAST)
    tracemalloc.start()
    began = time.monotonic()
    try:
        slot = ksmd.enter(boasting)
        for _ in range(4):
            ksmd.do_scan()
        assert not slot.gone, slot.lost
        ksmd.merge_range(slot, 0, VPN_END)
        (the_domain,) = ksmd.mm_list.domains()
        assert books.problems(the_domain) == []
        slot.counts[1] += 1
        books.mend(the_domain)
        ksmd.unmerge()
        ksmd.set("run", 2)
        ksmd.set("run", 1)
        ksmd.do_scan()
        boasting.unmap(BASE, BOAST)
        ksmd.do_scan()
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
        assert time.monotonic() - began < 20
    finally:
        tracemalloc.stop()
    assert not slot.gone, slot.lost


def test_a_process_that_claims_more_pages_than_the_kernel_knows_of_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, ksmd = SimulatedMachine(), new_ksmd()
    claiming = Claiming(machine, 666)
    claiming.map_area(BASE, (1 << 27) + (1 << 22))
    monkeypatch.setattr(claiming, "pages_max", lambda: 50)
    slot = ksmd.enter(claiming)
    (a, b), _ = processes(machine, ksmd, SAME, SAME)
    for _ in range(4):
        ksmd.do_scan(20_000)
    assert "more pages than it has" in slot.lost
    passes(ksmd, 3)
    assert len(a.merged_pages()) == len(b.merged_pages()) == 50


def test_areas_of_one_domain_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "AREAS_MAX", 50)
    machine, ksmd = SimulatedMachine(), new_ksmd()
    honest, many = process(machine, 1), SimulatedAddressSpace(machine, 2)
    for i in range(60):
        many.map_area(BASE + 3 * i, 1)
    slots = [ksmd.enter(honest), ksmd.enter(many)]
    passes(ksmd, 2)
    assert [slot.gone for slot in slots] == [False, True]


def test_ksmd_reads_nothing_in_the_memory_of_a_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who keeps that locked, by a fault that waits for FUSE say, would keep ksmd for ever."""
    machine, ksmd = SimulatedMachine(), Ksmd(owner=0)
    space = process(machine, 1, [0] * 50, domain=1)
    slot = ksmd.enter(space)
    passes(ksmd, 3)
    assert ksmd.rows()[0].ksm_zero_pages == 50
    monkeypatch.setattr(space, "present", lambda vpn, npages: pytest.fail("it was"))
    ksmd.recount_zeros(slot)
    assert ksmd.rows()[0].ksm_zero_pages == 50


def test_guests_are_merged_too_where_the_owners_processes_are_looked_at_in_one_batch() -> None:
    machine, ksmd = SimulatedMachine(), Ksmd(owner=0)
    own = [ksmd.enter(process(machine, 100 + i, range(1, 101), domain=0)) for i in range(2)]
    guests = [ksmd.enter(process(machine, 200 + i, range(1, 101), domain=1000)) for i in range(2)]
    for _ in range(50):
        ksmd.do_scan()
    assert [slot.merged for slot in own + guests] == [100] * 4
