"""Which pages have refs: those that were told of, wherever they lie, and not those that are only claimed."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samepage.ksmd import books, quota
from samepage.ksmd import refs as refs_module
from samepage.ksmd.domain import Domain
from samepage.ksmd.mm_slot import MmSlot
from samepage.ksmd.pieces import GRANULE, MANY
from samepage.ksmd.quota import Quotas
from samepage.ksmd.rmap import slices
from samepage.memory import AREA, PAGE_SIZE, RUN, VPN_END, ScanFlag, ScanResult
from samepage.memory.check import AREA_PAGES_MAX
from samepage.memory.simulated import SimulatedAddressSpace
from samepage.memory.simulated_memory import SimulatedMachine
from samepage.process.merge_domain import MergeDomain
from tests.ksmd.simulation import BASE, new_ksmd, passes

PAGES = 200
"""So many pages have the address spaces of the model."""

Runs = list[tuple[int, int]]


def runs_of(pages: Iterable[int]) -> Runs:
    """Ascending runs [start, end) of pages."""
    runs: Runs = []
    for page in sorted(pages):
        if runs and runs[-1][1] == page:
            runs[-1] = (runs[-1][0], page + 1)
        else:
            runs.append((page, page + 1))
    return runs


class Model:
    """Some slots of a domain, and for each the pages of its areas and the refs of known ones."""

    def __init__(self, n: int) -> None:
        machine = SimulatedMachine()
        self.domain = Domain(MergeDomain(0))
        self.slots = [MmSlot(SimulatedAddressSpace(machine, i), self.domain, i, "", "") for i in range(n)]
        self.domain.slots += self.slots
        self.areas: list[set[int]] = [set() for _ in self.slots]
        self.known: list[dict[int, int]] = [{} for _ in self.slots]
        self.sums = iter(range(1, 1 << 30))

    def set_areas(self, i: int, areas: Runs) -> None:
        self.areas[i] = {page for start, end in areas for page in range(start, end)}
        given = [(start, end - start) for start, end in areas if start < end]
        self.domain.set_areas(self.slots[i], np.array(given, AREA))
        self.known[i] = {page: ref for page, ref in self.known[i].items() if page in self.areas[i]}

    def tell(self, i: int, pages: set[int]) -> None:
        """It tells of pages, of which some may be in no area any more."""
        start, end = (np.array([run[k] for run in runs_of(pages)], np.int64) for k in (0, 1))
        if not len(start):
            return
        _, low, ref, n = self.domain.cover(self.slots[i], start, end)
        told = {
            page + k: base + k
            for page, base, n_ in zip(low.tolist(), ref.tolist(), n.tolist(), strict=True)
            for k in range(n_)
        }
        assert told.keys() == pages & self.areas[i]
        assert all(self.known[i].get(page, ref) == ref for page, ref in told.items()), "a ref moved"
        refs = np.array(sorted(told.values()), np.int64)
        self.domain.withdraw(self.slots[i], refs)
        self.domain.changed(self.slots[i], refs, np.array([next(self.sums) for _ in refs], np.uint64))
        self.known[i].update(told)

    def forget(self, i: int, pages: set[int]) -> None:
        gone = pages & self.known[i].keys()
        self.domain.forget(self.slots[i], np.array([self.known[i].pop(page) for page in gone], np.int64))

    def leave(self, i: int) -> None:
        self.domain.drop(self.slots[i])
        number = self.slots[i].number + 10
        self.slots[i] = MmSlot(self.slots[i].space, self.domain, number, "", "")
        self.domain.slots.append(self.slots[i])
        self.areas[i], self.known[i] = set(), {}

    def check(self) -> None:
        assert books.problems(self.domain) == []
        whose = {}
        for slot, known in zip(self.slots, self.known, strict=True):
            found = [(vpn, ref) for part in self.domain.known(slot) for vpn, ref in zip(*part, strict=True)]
            assert found == sorted(known.items())
            pages, refs = (np.array(found, np.int64).reshape(-1, 2)[:, k] for k in (0, 1))
            assert np.array_equal(slot.pieces.refs_of(pages), refs)
            assert np.array_equal(slot.pieces.vpns_of(refs), pages)
            many = np.argsort(refs).repeat(MANY + 1)  # that ascend are looked up in another way
            assert np.array_equal(slot.pieces.vpns_of(refs[many]), pages[many])
            assert not len(known) or len(slot.pieces) <= len(slot.areas) + PAGES // GRANULE
            whose.update(dict.fromkeys(known.values(), slot))
        refs = np.array(sorted(whose), np.int64)
        assert {ref: slot for slot, at in self.domain.cut(refs) for ref in refs[at].tolist()} == whose
        for slot, (at, vpns) in self.domain.by_memory(refs).items():
            assert (np.diff(vpns) > 0).all()
            assert np.array_equal(slot.pieces.refs_of(vpns), refs[at])


RUN_OF_PAGES = st.tuples(st.integers(0, PAGES), st.integers(1, 40)).map(lambda run: (run[0], run[0] + run[1]))
STEPS: st.SearchStrategy[tuple[str, list[Any]]] = st.one_of(
    st.tuples(st.just("areas"), st.lists(st.tuples(st.integers(0, 30), st.integers(0, 60)), max_size=5)),
    st.tuples(st.just("tell"), st.lists(st.one_of(RUN_OF_PAGES, st.integers(0, PAGES)), max_size=12)),
    st.tuples(st.just("forget"), st.lists(RUN_OF_PAGES, max_size=4)),
    st.tuples(st.sampled_from(["leave", "sweep", "mend"]), st.just([])),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), STEPS), max_size=40), st.booleans())
def test_pages_have_the_refs_that_a_dictionary_would_give(
    steps: list[tuple[int, tuple[str, list[Any]]]], many: bool
) -> None:
    """And keep them as long as they are known, whatever becomes of others."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(refs_module, "SWEEP_ROWS", 0)
        patched.setattr(refs_module, "FEW", 1 if many else 1000)
        model = Model(3)
        for i, (what, how) in steps:
            if what == "areas":  # gaps and lengths
                areas, at = [], 0
                for gap, length in how:
                    areas.append((at + gap, at + gap + length))
                    at += gap + length
                model.set_areas(i, areas)
            elif what == "leave":
                model.leave(i)
            elif what == "sweep":
                model.domain.sweep(model.slots[i])
            elif what == "mend":
                model.slots[i].counts[1] += 1
                books.mend(model.domain)
            else:
                pages = {p for run in how for p in (range(*run) if isinstance(run, tuple) else (run,))}
                (model.tell if what == "tell" else model.forget)(i, pages)
            model.check()


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 30)), max_size=20), st.integers(1, 40))
def test_slices_are_all_of_the_runs_a_part_at_a_time(runs: list[tuple[int, int]], most: int) -> None:
    starts, lengths = (np.array([run[k] for run in runs], np.int64) for k in (0, 1))
    parts = [
        [(int(i), at + k) for i, at, m in zip(*part, strict=True) for k in range(m)]
        for part in slices(starts, lengths, most)
    ]
    assert [row for part in parts for row in part] == [(i, s + k) for i, (s, n) in enumerate(runs) for k in range(n)]
    assert all(len(part) == most for part in parts[:-1])


class Sparse(SimulatedAddressSpace):
    """Tells of a page in `every`, as far as asked."""

    every = 512
    count = 0
    told = 0

    def scan(self, vpn: int, budget: int, flags: ScanFlag = ScanFlag.NONE, end: int = VPN_END) -> ScanResult:
        first = max(0, -(-(vpn - BASE) // self.every))
        n = 0 if self.told >= self.count else max(0, min(budget, 3000, self.count - first))
        runs = np.zeros(n, RUN)
        runs["vpn"], runs["npages"] = BASE + self.every * (first + np.arange(n)), 1
        sums = np.arange(first, first + n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        self.told += n
        more = first + n < self.count and n
        return ScanResult(runs, sums, BASE + self.every * (first + n) if more else 0, self._areas_seq, 0)


@pytest.mark.parametrize("every", [16, 33, 512])
def test_a_page_alone_takes_less_than_two_hundred_bytes(every: int) -> None:
    machine, ksmd = SimulatedMachine(), new_ksmd()
    space = Sparse(machine, 1)
    space.every, space.count = every, 20_000
    space.map_area(BASE, every * 20_000)
    slot = ksmd.enter(space)
    passes(ksmd, 3)
    assert slot.known == 20_000
    assert ksmd.counters().metadata_bytes < 200 * 20_000


def test_claims_of_memory_cost_nothing() -> None:
    machine, ksmd = SimulatedMachine(), new_ksmd()
    for pid in range(20):
        space = SimulatedAddressSpace(machine, pid)
        space.map_area(BASE, AREA_PAGES_MAX)
        space.write(BASE + (1 << 30), 1, 2, 3)
        ksmd.enter(space)
    passes(ksmd, 3)
    assert ksmd.counters().pages_shared == 3
    (domain,) = ksmd.mm_list.domains()
    assert domain.rmap.top <= 20 * 2 * GRANULE
    assert ksmd.counters().metadata_bytes < 100_000


def test_pages_that_were_told_of_in_any_order_are_merged_in_that_of_memory() -> None:
    """One extent a segment, though their refs lie all over the place."""
    machine, ksmd = SimulatedMachine(), new_ksmd()
    spaces = [SimulatedAddressSpace(machine, pid) for pid in (1, 2)]
    order = list(range(0, 1024, 4))
    random.Random(3).shuffle(order)
    for space in spaces:
        space.map_area(BASE, 1024)
        ksmd.enter(space)
    ksmd.set("pages_to_scan", 1 << 20)
    for part in np.array_split(np.array(order), 8):
        for space in spaces:
            for at in part.tolist():
                space.write(BASE + at, *range(at + 5000 * len(order), at + 5000 * len(order) + 4))
        order.append(0)  # what is written next is something else
        for _ in range(2):
            ksmd.do_scan()
    for space in spaces:
        space.write(BASE, *range(1, 1025))
    (slot, _) = ksmd.slots()
    assert (np.diff(slot.pieces.base) < 0).any()
    passes(ksmd, 3)
    assert machine.saved == 1024
    assert [space.extents() for space in spaces] == [1, 1]


def test_who_gives_pages_up_and_tells_of_others_takes_no_more_memory_each_time() -> None:
    """However few of them stay, and wherever those lie."""
    model = Model(1)
    (slot,) = model.slots
    rng = random.Random(4)
    held: set[int] = set()
    most = []
    for step in range(40):
        new = {512 * (1000 * step + k) for k in range(300)}
        held = set(rng.sample(sorted(held), len(held) * 6 // 7)) | new if held else new
        model.domain.set_areas(slot, np.array([(page, 1) for page in sorted(held)], AREA))
        model.domain.cover(slot, np.array(sorted(new)), np.array(sorted(new)) + 1)
        assert not books.problems(model.domain)
        most.append(model.domain.rmap.resident())
    assert most[-1] < 9 * 2 * len(held) * 2
    assert slot.pieces.npages == len(held)


def test_what_was_discarded_one_after_the_other_is_not_kept_for_ever() -> None:
    machine, ksmd = SimulatedMachine(), new_ksmd()
    spaces = [SimulatedAddressSpace(machine, pid) for pid in (1, 2)]
    for space in spaces:
        space.map_area(BASE, 1 << 24)
        ksmd.enter(space)
    for n in range(30):
        at = [BASE + 64 * (100 * n + k) for k in range(100)]
        for space in spaces:
            for page in at:
                space.write(page, page)
        passes(ksmd, 2)
        assert machine.saved == 100
        for space in spaces:
            space.discard(at[0], 6400)
        passes(ksmd, 1)
    assert all(slot.pieces.npages <= refs_module.SWEEP_ROWS + 100 * 2 * GRANULE for slot in ksmd.slots())
    assert [books.problems(domain) for domain in ksmd.mm_list.domains()] == [[]]


def test_namespaces_do_not_multiply_what_a_user_may_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "RESIDENT_MAX", 1 << 20)
    machine, ksmd = SimulatedMachine(), new_ksmd()
    for namespace in range(10):
        sparse = Sparse(machine, namespace, domain=MergeDomain(7, namespace))
        sparse.count = 20_000
        sparse.map_area(BASE, 512 * 20_000)
        ksmd.enter(sparse)
    honest = [SimulatedAddressSpace(machine, 100 + n, domain=8) for n in range(2)]
    for space in honest:
        space.map_area(BASE, 10)
        space.write(BASE, *range(1, 11))
        ksmd.enter(space)
    passes(ksmd, 3)
    assert machine.saved == 10
    held = sum(
        domain.rmap.resident() + sum(s.pieces.nbytes() for s in domain.slots) for domain in ksmd.mm_list.domains()
    )
    assert held < 2 << 20
    assert ksmd.counters().metadata_bytes < 4 << 20
    for slot in ksmd.slots():
        if slot.pid < 100:
            ksmd.exit(slot)
    ksmd.do_scan()
    (left,) = {domain.quota for domain in ksmd.mm_list.domains()}
    assert left.nbytes < 2 * PAGE_SIZE
    assert left.areas == 2


def test_areas_are_counted_by_user_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "AREAS_MAX", 50)
    machine, ksmd = SimulatedMachine(), new_ksmd()
    slots = []
    for namespace in range(3):
        space = SimulatedAddressSpace(machine, namespace, domain=MergeDomain(7, namespace))
        for i in range(20):
            space.map_area(BASE + 3 * i, 1)
        slots.append(ksmd.enter(space))
    passes(ksmd, 2)
    assert sorted(slot.gone for slot in slots) == [False, False, True]


def test_all_users_but_the_owner_have_a_limit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "RESIDENT_MAX", 1000)
    quotas = Quotas(owner=0)
    users = [quotas.of(user) for user in range(4)]
    assert quotas.of(2) is users[2]
    for user in users[1:]:
        user.hold(900, 0)
    assert [user.is_full for user in users] == [False, True, True, True]
    users[3].hold(-900, 0)
    assert [user.is_full for user in users] == [False] * 4
