"""Looking at pages: what an `AddressSpace.scan` says becomes states (scan_get_next_rmap_item, and the start of
cmp_and_merge_page)."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from samepage.arrays import Bools, Ints, expand
from samepage.ksmd.domain import Domain
from samepage.ksmd.mm_slot import MmSlot, Structured
from samepage.ksmd.rmap import HAS_CHECKSUM, HAS_NODE, IS_MERGED, PageState
from samepage.ksmd.stable import SEGMENT_PAGES
from samepage.memory import U64, VPN_END, AddressSpaceGone, AddressSpaceSilent, Areas, RunKind, ScanFlag, ScanResult


@dataclass(slots=True)
class Look:
    """One answer to a scan: what was said, and the areas too if they changed. `wall_ns` bounds what it may
    claim in CPU time."""

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
"""So often in a pass, and twice for each of its areas, a process may get on by less than `STEP_MIN` pages in a look."""


def look(slot: MmSlot, vpn: int, budget: int, flags: ScanFlag, end: int = VPN_END) -> Look:
    """Ask a process for one step of its scan, before page `end`. Runs in any thread: nothing of ksmd's is touched."""
    started = time.perf_counter_ns()
    with slot.waited_for():
        reply = slot.space.scan(vpn, budget, flags, end)
    slot.idle_looks += 0 < reply.next_vpn < vpn + min(budget, STEP_MIN)
    if slot.idle_looks > IDLE_LOOKS + 2 * len(slot.pieces):
        raise AddressSpaceGone("its scan hardly gets on")
    try:
        return heard(slot, reply, started)
    except AddressSpaceSilent:
        slot.unheard.append(reply)
        raise


def heard(slot: MmSlot, reply: ScanResult, started: int) -> Look:
    """What it answered, and the areas if they changed."""
    areas = None
    if reply.areas_seq != slot.areas_seq:
        with slot.waited_for():
            areas = slot.space.areas()
    return Look(reply, areas, time.perf_counter_ns() - started)


ORDER = (RunKind.GONE, RunKind.BROKEN, RunKind.FOUND, RunKind.HASHED)
"""Of what a scan told, that comes first which ends something."""


def ingest(domain: Domain, slot: MmSlot, seen: Look, passes: int) -> Seen:
    """Take in what a scan said. AddressSpaceGone if it makes no sense."""
    reply = seen.reply
    if seen.areas is not None:
        _take_areas(domain, slot, seen.areas)
    slot.cpu_ns += min(reply.cpu_ns, seen.wall_ns)
    # Areas that changed once more after the scan may have lost what it reports; then, and only then, runs may
    # lie outside: their pages are gone.
    strict = reply.areas_seq == slot.areas_seq
    outcome = Seen()
    runs = reply.runs
    if not len(runs):
        return outcome
    by_kind = {kind: runs[runs["kind"] == kind] for kind in ORDER}
    # All of it is looked at before anything is changed.
    located = {kind: _located(slot, of_kind, strict) for kind, of_kind in by_kind.items() if len(of_kind)}
    slot.expect(int(by_kind[RunKind.BROKEN]["npages"].sum(dtype=np.int64)))
    for kind, (_, _, ref, npages) in located.items():
        if kind != RunKind.HASHED:
            outcome.turned += int(npages.sum())
            if kind == RunKind.FOUND:
                _found(domain, slot, by_kind[kind], passes)
                continue
            if kind == RunKind.GONE:
                for refs in domain.known(ref, npages):
                    domain.forget(slot, refs)
            else:
                outcome.broken += _broken(domain, slot, expand(ref, npages), passes)
    if RunKind.HASHED in located:
        hashed = by_kind[RunKind.HASHED]
        run, low, ref, npages = located[RunKind.HASHED]
        sums = reply.checksums
        if len(sums) != int(npages.sum()):
            lengths = hashed["npages"].astype(np.int64)
            sums = sums[expand((np.cumsum(lengths) - lengths)[run] + low - hashed["vpn"].astype(np.int64)[run], npages)]
        outcome.hashed = len(sums)
        changed = _hashed(domain, slot, expand(ref, npages), sums, outcome)
        if changed is not None:
            outcome.changed -= slot.ages.changed(expand(low, npages)[changed])
    return outcome


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
"""Only of a process with so many mergeable pages at most (1 GiB) are zero pages recounted: some milliseconds."""


def recount_zeros(domain: Domain, slot: MmSlot) -> None:
    """See which pages merged with the zero page are that no more: were written, or are in no area now. Hashes none."""
    refresh_areas(domain, slot)
    if slot.npages > RECOUNT_PAGES:
        return
    for vpn, npages, base in slot.pieces.tolist():
        zeros = np.flatnonzero(domain.state[base : base + npages] == PageState.ZERO)
        if len(zeros):
            there = slot.space.present(vpn + int(zeros[0]), int(zeros[-1] - zeros[0]) + 1)
            _, _, ref, lengths = slot.locate(there["vpn"], there["npages"])
            refs = expand(ref, lengths)
            domain.set_state(slot, refs[domain.state[refs] == PageState.ZERO], PageState.BROKEN)


def _located(slot: MmSlot, runs: Structured, strict: bool) -> tuple[Ints, Ints, Ints, Ints]:
    located = slot.locate(runs["vpn"], runs["npages"].astype(np.uint64))
    if strict and int(located[3].sum()) != int(runs["npages"].sum(dtype=np.int64)):
        raise AddressSpaceGone("talks nonsense: runs outside its areas")
    return located


def _hashed(domain: Domain, slot: MmSlot, refs: Ints, sums: U64, outcome: Seen) -> Bools | None:
    """New checksums. A page whose checksum is what it was is left as it is. Returns which pages were looked at before
    and are not what they were; None: no page."""
    old = domain.state[refs]
    again = None
    outcome.first_looks = len(old) - int(np.count_nonzero(old))
    full = outcome.first_looks > 0 and domain.is_full
    if outcome.first_looks < len(old) or full:
        new = domain.checksum[refs] != sums
        new |= ~HAS_CHECKSUM[old]
        if full:
            new &= old != PageState.UNTOUCHED
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
    refs = refs[merged] if domain.is_full else refs[merged | (state == PageState.UNTOUCHED)]
    if not len(refs):
        return 0
    domain.withdraw(slot, refs)
    domain.rmap.touch(refs)
    domain.checksum[refs] = passes
    domain.set_state(slot, refs, PageState.BROKEN)
    slot.islands_due, slot.islands_attempts = 0, 0
    return int(np.count_nonzero(merged))


def _found(domain: Domain, slot: MmSlot, runs: Structured, passes: int) -> None:
    """Pages that are merged already: by fork, by mremap, or by a service that went."""
    runs = runs[runs["offset"] < SEGMENT_PAGES]  # behind the end of a segment nothing can be merged with it
    runs["npages"] = np.minimum(runs["npages"], SEGMENT_PAGES - runs["offset"])
    for found in runs:
        offset, npages = int(found["offset"]), int(found["npages"])
        segment = domain.stable.found(int(found["ino"]), offset, npages, passes)
        _, low, ref, lengths = _located(slot, found.reshape(1), strict=False)
        refs, vpns = expand(ref, lengths), expand(low, lengths)
        room = np.zeros(len(refs), np.bool_)
        if segment is not None:
            nodes = segment.base + offset + vpns - int(found["vpn"])
            new = ~(HAS_NODE[domain.state[refs]] & (domain.checksum[refs].astype(np.int64) == nodes))
            refs, vpns, nodes = refs[new], vpns[new], nodes[new]
            room = domain.stable.has_room(nodes)
            if domain.is_full:
                room &= domain.state[refs] != PageState.UNTOUCHED
            _adopt(domain, slot, refs[room], vpns[room], nodes[room])
            domain.stable.close_unused([segment])
        _broken(domain, slot, refs[~room], passes)  # more than can be counted: not known to be merged, and left alone


def _adopt(domain: Domain, slot: MmSlot, refs: Ints, vpns: Ints, nodes: Ints) -> None:
    if not len(refs):
        return
    domain.stable.attach(nodes)  # before the pages leave another node of the same segment, lest it be closed
    domain.withdraw(slot, refs)
    inherited = domain.inherited(slot, vpns, nodes)
    domain.rmap.touch(refs)
    domain.checksum[refs] = nodes.astype(np.uint64)
    domain.set_state(slot, refs, PageState.MERGED)
    domain.set_state(slot, refs[inherited], PageState.INHERITED)
