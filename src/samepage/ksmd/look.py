"""Looking at pages: what an `AddressSpace.scan` says becomes states (scan_get_next_rmap_item, and the start of
cmp_and_merge_page)."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from samepage.arrays import Bools, Ints, expand
from samepage.ksmd.domain import Domain
from samepage.ksmd.mm_slot import MmSlot, Structured
from samepage.ksmd.pieces import NONE, Stretches
from samepage.ksmd.rmap import HAS_CHECKSUM, HAS_NODE, IS_MERGED, PageState
from samepage.ksmd.stable import SEGMENT_PAGES
from samepage.memory import (
    NO_STALLS,
    U64,
    VPN_END,
    AddressSpaceGone,
    AddressSpaceSilent,
    Areas,
    RunKind,
    ScanFlag,
    ScanResult,
)


@dataclass(slots=True)
class Look:
    """One answer to a scan, and the areas if they changed, too. The process cannot claim more CPU time than
    `wall_ns`."""

    reply: ScanResult
    areas: Areas | None
    wall_ns: int


@dataclass(slots=True)
class Seen:
    """What came of a `Look`: pages hashed, pages among them never seen before, those whose checksum is new (but for
    blocks where it always is, see `Ages`); pages that are merged no more, or that somebody else merged; and those that
    we merged and the application wrote."""

    hashed: int = 0
    first_looks: int = 0
    changed: int = 0
    turned: int = 0
    broken: int = 0


STEP_MIN = 64
IDLE_LOOKS = 256
"""How many looks of a pass may make less progress than `STEP_MIN` pages, besides two for each area of the process."""


def look(slot: MmSlot, vpn: int, budget: int, flags: ScanFlag, end: int = VPN_END) -> Look:
    """Ask a process for one step of its scan, before page `end`. Runs in any thread: it touches nothing of ksmd's."""
    started = time.perf_counter_ns()
    with slot.waited_for():
        reply = slot.space.scan(vpn, budget, flags, end)
    slot.idle_looks += 0 < reply.next_vpn < vpn + min(budget, STEP_MIN)
    if slot.idle_looks > IDLE_LOOKS + 2 * len(slot.areas):
        raise AddressSpaceGone("its scan hardly gets on")
    try:
        return heard(slot, reply, started)
    except AddressSpaceSilent:
        slot.unheard.append(reply)
        raise


def heard(slot: MmSlot, reply: ScanResult, started: int) -> Look:
    """Its answer, and the areas if they changed."""
    areas = None
    # While it is in motion its areas change all the time: what it has that is new is all that matters.
    if reply.areas_seq != slot.areas_seq and (len(reply.runs) or not slot.is_left_out):
        with slot.waited_for():
            areas = slot.space.areas()
    return Look(reply, areas, time.perf_counter_ns() - started)


def ingest(domain: Domain, slot: MmSlot, seen: Look, passes: int) -> Seen:
    """Take in the answer to a scan. Raises AddressSpaceGone if it makes no sense."""
    reply = seen.reply
    if seen.areas is not None:
        _take_areas(domain, slot, seen.areas)
    slot.cpu_ns += min(reply.cpu_ns, seen.wall_ns)
    if reply.stalls is not NO_STALLS:
        slot.stalls += reply.stalls
    # Areas that changed once more after the scan may have lost what it reports; then, and only then, runs may
    # lie outside: their pages are gone.
    strict = reply.areas_seq == slot.areas_seq
    outcome = Seen()
    if not len(reply.runs):
        return outcome
    if strict and not _lie_in(slot.areas, reply.runs):
        raise AddressSpaceGone("talks nonsense: runs outside its areas")
    is_gone = reply.runs["kind"] == RunKind.GONE
    gone, runs = reply.runs[is_gone], reply.runs[~is_gone]
    hashed = runs["kind"] == RunKind.HASHED
    outcome.turned = int(gone["npages"].sum(dtype=np.int64) + runs["npages"][~hashed].sum(dtype=np.int64))
    slot.expect(int(runs["npages"][runs["kind"] == RunKind.BROKEN].sum(dtype=np.int64)))
    if outcome.turned:
        runs = _as_far_as_found(runs)
    start, end = _pages_of(runs)
    try:
        located = domain.cover(slot, start, end)
    except MemoryError as error:
        raise AddressSpaceGone("more pages than can be kept") from error
    # All of it was looked at before anything is changed.
    for refs in domain.known_refs(*slot.pieces.locate(*_pages_of(gone))[2:]):
        domain.forget(slot, refs)
    if outcome.turned:
        located = _take_in_turned(domain, slot, runs, located, passes, outcome)
    _take_in_hashed(domain, slot, runs, located, reply.checksums, outcome)
    return outcome


Located = tuple[Ints, Ints, Ints, Ints]
"""Runs along the pieces, as `Pieces.locate` returns them."""


def _pages_of(runs: Structured) -> tuple[Ints, Ints]:
    start = runs["vpn"].astype(np.int64)
    return start, start + runs["npages"].astype(np.int64)


def _lie_in(areas: Stretches, runs: Structured) -> bool:
    return areas.count(*_pages_of(runs)) == int(runs["npages"].sum(dtype=np.int64))


def _as_far_as_found(runs: Structured) -> Structured:
    """Cut at the end of a segment: beyond it nothing can be merged."""
    most = SEGMENT_PAGES - np.minimum(runs["offset"], SEGMENT_PAGES)
    found = runs["kind"] == RunKind.FOUND
    runs["npages"][found] = np.minimum(runs["npages"], most)[found]
    return runs[runs["npages"] > 0]


def _take_in_turned(
    domain: Domain, slot: MmSlot, runs: Structured, located: Located, passes: int, outcome: Seen
) -> Located:
    """Runs of pages that are broken, or merged already. Returns what is left, those that were hashed."""
    kind = runs["kind"][located[0]]
    broken, found = kind == RunKind.BROKEN, kind == RunKind.FOUND
    if broken.any():
        outcome.broken = _broken(domain, slot, expand(located[2][broken], located[3][broken]), passes)
    if found.any():
        run, low, ref, npages = (column[found] for column in located)
        _found(domain, slot, runs, run, (low, ref, npages), passes)
    rest = kind == RunKind.HASHED
    run, low, ref, npages = (column[rest] for column in located)
    return run, low, ref, npages


def _take_in_hashed(domain: Domain, slot: MmSlot, runs: Structured, located: Located, sums: U64, outcome: Seen) -> None:
    run, low, ref, npages = located
    if len(sums) != int(npages.sum()):
        lengths = np.where(runs["kind"] == RunKind.HASHED, runs["npages"], 0).astype(np.int64)
        sums = sums[expand((np.cumsum(lengths) - lengths)[run] + low - runs["vpn"].astype(np.int64)[run], npages)]
    if not len(sums):
        return
    outcome.hashed = len(sums)
    changed = _hashed(domain, slot, expand(ref, npages), sums, outcome)
    if changed is not None:
        outcome.changed -= slot.ages.changed(expand(low, npages)[changed])


def _take_areas(domain: Domain, slot: MmSlot, areas: Areas) -> None:
    try:
        domain.set_areas(slot, areas.ranges)
    except MemoryError as error:
        raise AddressSpaceGone("more pages than can be kept") from error
    slot.areas_seq = areas.seq
    slot.merge_any = areas.merge_any


def refresh_areas(domain: Domain, slot: MmSlot) -> None:
    """Ask for the areas now."""
    with slot.waited_for():
        areas = slot.space.areas()
    _take_areas(domain, slot, areas)


RECOUNT_PAGES = 1 << 18
"""Zero pages are recounted only for processes with at most this many mergeable pages (1 GiB), which takes some
milliseconds."""


def recount_zeros(domain: Domain, slot: MmSlot) -> None:
    """Find the pages that are merged with the zero page no more: they were written, or are in no area now. Hashes
    none."""
    refresh_areas(domain, slot)
    if slot.npages > RECOUNT_PAGES:
        return
    known = [vpns[domain.state[refs] == PageState.ZERO] for vpns, refs in domain.known(slot)]
    zeros = np.concatenate([NONE, *known])
    first, past = np.searchsorted(zeros, slot.areas.start), np.searchsorted(zeros, slot.areas.end)
    for i, j in zip(first[first < past].tolist(), past[first < past].tolist(), strict=True):
        there = slot.space.present(int(zeros[i]), int(zeros[j - 1] - zeros[i]) + 1)
        _, _, ref, lengths = slot.pieces.locate(*_pages_of(there))
        refs = expand(ref, lengths)
        domain.set_state(slot, refs[domain.state[refs] == PageState.ZERO], PageState.BROKEN)


def _hashed(domain: Domain, slot: MmSlot, refs: Ints, sums: U64, outcome: Seen) -> Bools | None:
    """New checksums. A page whose checksum is what it was is left as it is. Returns which pages were looked at before
    and are not what they were; None: no page."""
    old = domain.state[refs]
    again = None
    outcome.first_looks = len(old) - int(np.count_nonzero(old))
    if outcome.first_looks < len(old):
        new = domain.checksum[refs] != sums
        new |= ~HAS_CHECKSUM[old]
        refs, sums = refs[new], sums[new]
        domain.withdraw(slot, refs)
        again = new & (old != PageState.UNTOUCHED)
    outcome.changed = len(refs)
    if len(refs):
        domain.changed(slot, refs, sums)
    return again


def _broken(domain: Domain, slot: MmSlot, refs: Ints, passes: int) -> int:
    """Copy-on-write was broken. What is known not to be merged (we may have broken it ourselves) stays. Returns how
    many pages were known to be merged."""
    state = domain.state[refs]
    merged = IS_MERGED[state]
    refs = refs[merged | (state == PageState.UNTOUCHED)]
    if not len(refs):
        return 0
    domain.withdraw(slot, refs)
    domain.checksum[refs] = passes
    domain.set_state(slot, refs, PageState.BROKEN)
    slot.islands_due, slot.islands_attempts = 0, 0
    return int(np.count_nonzero(merged))


def _found(
    domain: Domain, slot: MmSlot, runs: Structured, run: Ints, parts: tuple[Ints, Ints, Ints], passes: int
) -> None:
    """Pages that are merged already: by fork, by mremap, or by a service that went. `parts` of runs of those numbers:
    where they begin, their first refs, their pages."""
    low, ref, npages = parts
    first_node, segments = np.full(len(runs), -1, np.int64), []
    for i in dict.fromkeys(run.tolist()):
        found = runs[i]
        offset = int(found["offset"])
        segment = domain.stable.found(int(found["ino"]), offset, int(found["npages"]), passes)
        if segment is not None:
            first_node[i] = segment.base + offset
            segments.append(segment)
    node = np.where(first_node[run] >= 0, first_node[run] + low - runs["vpn"].astype(np.int64)[run], -1)
    refs, vpns = expand(ref, npages), expand(low, npages)
    known = np.repeat(node >= 0, npages)
    nodes = np.where(known, expand(node, npages), -1)
    is_same = HAS_NODE[domain.state[refs]] & (domain.checksum[refs].astype(np.int64) == nodes)
    room = known & ~is_same
    room[room] = domain.stable.has_room(nodes[room])
    domain.stable.attach(nodes[room])  # before pages leave nodes of the same segments, lest these be closed
    domain.stable.close_unused(list(dict.fromkeys(segments)))
    _adopt(domain, slot, refs[room], vpns[room], nodes[room])
    _broken(domain, slot, refs[~room & ~is_same], passes)  # more than can be counted: left alone


def _adopt(domain: Domain, slot: MmSlot, refs: Ints, vpns: Ints, nodes: Ints) -> None:
    if not len(refs):
        return
    domain.withdraw(slot, refs)
    inherited = domain.inherited(slot, vpns, nodes)
    domain.checksum[refs] = nodes.astype(np.uint64)
    domain.set_state(slot, refs, PageState.MERGED)
    domain.set_state(slot, refs[inherited], PageState.INHERITED)
