"""What the tests of ksmd have in common: simulated processes, and what must hold of them at any time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from samepage.ksmd import Ksmd, PageState
from samepage.ksmd.merge_work import Concurrently
from samepage.ksmd.mm_slot import MmSlot
from samepage.ksmd.rmap import IS_MERGED
from samepage.ksmd.stable import SEGMENT_PAGES
from samepage.memory import PAGE_SIZE
from samepage.memory.simulated import SimulatedAddressSpace
from samepage.memory.simulated_memory import SimulatedMachine

BASE = 1000
"""First page of the area that `process` makes."""
SAME = range(1, 51)
"""Pages for two processes to have in common."""


class Clock:
    """Time that passes only when told to; CPU time too."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def new_ksmd(clock: Clock | None = None, concurrently: Concurrently = map) -> Ksmd:
    """A ksmd for which no time passes unless told."""
    clock = clock or Clock()
    return Ksmd(clock=clock, cpu_clock=lambda: 0.0, concurrently=concurrently)


def process(
    machine: SimulatedMachine, pid: int, contents: Iterable[int] = (), npages: int = 256, **how: Any
) -> SimulatedAddressSpace:
    """A process with one area at `BASE`, in which `contents` are written."""
    space = SimulatedAddressSpace(machine, pid, **how)
    space.map_area(BASE, npages)
    space.write(BASE, *contents)
    return space


def processes(
    machine: SimulatedMachine, ksmd: Ksmd, *contents: Iterable[int], **how: Any
) -> tuple[list[SimulatedAddressSpace], list[MmSlot]]:
    """Processes that took part from the start, one for each of `contents`."""
    spaces = [process(machine, 100 + i, list(content), **how) for i, content in enumerate(contents)]
    return spaces, [ksmd.enter(space) for space in spaces]


def passes(ksmd: Ksmd, n: int = 1) -> None:
    """Run until `n` passes more are over, and their candidates are merged."""
    goal = ksmd.counters().full_scans + n
    for _ in range(10_000):
        ksmd.do_scan()
        if not ksmd.slots():
            return  # and no pass either
        if ksmd.counters().full_scans >= goal and not any(d.candidates for d in ksmd.mm_list.domains()):
            return
    raise AssertionError("a pass that never ends")


def check(ksmd: Ksmd, machine: SimulatedMachine, spaces: dict[MmSlot, SimulatedAddressSpace]) -> None:
    """What must hold whatever happened: the books agree with each other."""
    counters = ksmd.counters()
    rows = ksmd.rows()
    assert counters.pages_shared + counters.pages_sharing == sum(row.ksm_merging_pages for row in rows)
    assert counters.ksm_zero_pages == sum(row.ksm_zero_pages for row in rows)
    assert sum(row.merged for row in rows) == sum(row.ksm_merging_pages + row.ksm_zero_pages for row in rows)
    saved = counters.pages_sharing - counters.pages_inherited - counters.pages_dead + counters.ksm_zero_pages
    assert counters.bytes_saved == saved * PAGE_SIZE
    assert counters.general_profit == counters.bytes_saved - counters.metadata_bytes
    unshared = sharers = 0
    for domain in ksmd.mm_list.domains():
        stable, refs = domain.stable, domain.unstable.numbers()
        assert domain.unstable.in_order()
        assert stable.index.in_order()
        assert (domain.state[refs] == PageState.UNSHARED).all()
        unshared += len(refs)
        nodes: list[int] = []
        for slot in domain.slots:
            known = np.zeros(len(PageState), np.int64)
            pieces = slot.pieces
            for npages, base in zip((pieces.end - pieces.start).tolist(), pieces.base.tolist(), strict=True):
                state = domain.state[base : base + npages]
                known += np.bincount(state, minlength=len(PageState))
                has_node = (state == PageState.MERGED) | (state == PageState.INHERITED)
                nodes += domain.checksum[base : base + npages][has_node].tolist()
            assert (slot.counts[1:] == known[1:]).all()
        sharers += len(nodes)
        for segment in stable.segments:
            of_it = stable.sharers[segment.base : segment.base + segment.rows]
            assert of_it.sum() > 0, "a segment nobody uses is open"
            assert segment.live == np.count_nonzero(of_it)
            assert segment.rows <= SEGMENT_PAGES
        counted = np.bincount(nodes, minlength=len(stable.sharers))
        assert (stable.sharers[: len(counted)] == counted).all()
        groups = np.unique(stable.checksum[stable.index.numbers()], return_counts=True)[1]
        assert stable.chains == np.count_nonzero(groups > 1)
        assert stable.dups == groups[groups > 1].sum()
    assert unshared == counters.pages_unshared
    assert sharers == counters.pages_shared + counters.pages_sharing
    open_segments = [segment for segment in machine.segments.values() if segment.is_open]
    handles = [s.handle for d in ksmd.mm_list.domains() for s in d.stable.segments if s.handle]
    assert {id(s) for s in handles} == {id(s) for s in open_segments}
    for slot, space in spaces.items():
        if space.alive and not slot.gone:
            assert_states_are_true(slot, space)


def assert_states_are_true(slot: MmSlot, space: SimulatedAddressSpace) -> None:
    """Every page that is merged by our hand is known to be (what came by fork may not have been found yet)."""
    known = {vpn for vpns, refs in slot.domain.known(slot) for vpn in vpns[IS_MERGED[slot.domain.state[refs]]].tolist()}
    assert space.merged_pages() & space._seen_merged <= known
