"""Undoing it (break_ksm, unmerge_ksm_pages): every merged page gets a private copy, if there is memory for it.

The work is cut into ranges, and between two of them it can be cancelled. It stops at the first error: what was
done stays done, the rest stays merged and known, and the same call again goes on from there.
"""

from __future__ import annotations

import errno
import operator
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from samepage.arrays import Ints, run_starts
from samepage.ksmd.domain import Domain
from samepage.ksmd.look import refresh_areas
from samepage.ksmd.merge_work import Concurrently
from samepage.ksmd.mm_slot import BREAK_FEW, MmSlot
from samepage.ksmd.pieces import NONE
from samepage.ksmd.rmap import HAS_NODE, IS_MERGED, PageState
from samepage.memory import PAGE_SIZE, AddressSpaceGone, BreakResult

BREAK_PAGES = 2048
"""Merged pages are broken 8 MiB at a time, so that cancelling never waits long."""

BREAK_QUICK, BREAK_SLOW = 0.1, 0.5
"""Seconds for one answer. A process that takes less is asked for twice as many pages the next time, one that takes more
for a quarter. So any process that makes progress answers in time, however slow the machine, or if memory has to be
reclaimed first."""

BREAK_RATE = 64 << 20
"""The slowest rate, in bytes a second, at which a process copies without being called slow: memory may have to be
reclaimed for it."""

FAULTS_MAX = 1024
"""How often one unmerge halves what is left of a range, to find the page that cannot be mapped. A process that says so
of all its pages would keep ksmd busy with every single one."""

SPARSE_SHARE, SPARSE_PASSES, SPARSE_PAGES = 0.25, 8, 256
"""A segment is sparse when less than this share of its pages is in use after so many passes. When at least so many
pages (1 MiB) are held for nothing in sparse segments, their last users are moved out."""

Cancelled = Callable[[], bool]


@dataclass(slots=True)
class ProcessBreak:
    """What an unmerge did to one process; `pages_remaining` are still merged."""

    pid: int
    errno: int = 0
    pages_unmerged: int = 0
    pages_remaining: int = 0
    comm: str = ""
    state: str = ""
    """Why it does not answer, if it is stopped, traced or frozen."""


@dataclass(slots=True)
class UnmergeResult(BreakResult):
    """A `BreakResult` for everything asked for, and a row for each process that was reached."""

    processes: list[ProcessBreak] = field(default_factory=list)

    def add(self, row: ProcessBreak, last: BreakResult) -> None:
        """Take in the outcome of one process; `last` is the answer that ended it."""
        self.processes.append(row)
        self.errno = row.errno or self.errno
        self.pages_unmerged += row.pages_unmerged
        self._remain(row.pages_remaining)
        self.bytes_available, self.unseen = last.bytes_available, last.unseen

    def add_lost(self, row: ProcessBreak) -> None:
        """Take in a process that could not be asked, or not to its end."""
        self.processes.append(row)
        self.errno = self.errno or row.errno
        self._remain(row.pages_remaining)

    def _remain(self, npages: int) -> None:
        """Add pages that were to be unmerged and are still merged."""
        self.pages_remaining += npages
        self.bytes_needed = self.pages_remaining * PAGE_SIZE

    @property
    def stops(self) -> bool:
        """Whether it is useless to go on with others."""
        return self.errno in (errno.ENOMEM, errno.EINTR)


def unmerge_pages(
    domain: Domain,
    slot: MmSlot,
    vpn: int,
    npages: int,
    cancelled: Cancelled,
    leave_alone: bool,
    concurrently: Concurrently = map,
) -> tuple[ProcessBreak, BreakResult]:
    """Break all merged pages of a range (unmerge_ksm_pages), also those ksmd does not know of yet.

    `leave_alone`: the pages are not merged again until they change; else they are candidates after a pass.
    Returns the outcome and the answer that ended it. AddressSpaceGone goes through.
    """
    refresh_areas(domain, slot)
    slot.faults = 0
    row, last, damaged = ProcessBreak(slot.pid, comm=slot.comm), BreakResult(), 0
    known: Callable[[], BreakResult] | None = None
    runs = _Runs(domain, slot, vpn, npages)
    while True:
        run = runs.next()
        # What became of one range is taken in while the process has the next in hand.
        steps = [known] if known else []
        if run and not last.errno:
            if cancelled():
                last = BreakResult(errno.EINTR)
            else:
                steps.append(partial(_ask, slot, *run))
        if not steps:
            break
        results = list((concurrently if len(steps) > 1 else map)(operator.call, steps))
        if known:
            done, known = results.pop(0), None
            row.pages_unmerged += done.pages_unmerged
            damaged += 0 if done.errno else done.pages_remaining
            last = last if last.errno else done
        if run and results:
            runs.heard(results[0])
            known = partial(_take_in, domain, slot, *run, results[0], leave_alone)
            if results[0].errno not in (0, errno.EFAULT) and not last.errno:
                last = results[0]
    row.errno = last.errno or (errno.EFAULT if damaged else 0)
    row.pages_remaining = max(_merged_in(domain, slot, vpn, npages), damaged, last.pages_remaining)
    return row, last


def _pages_in(slot: MmSlot, vpn: int, npages: int) -> int:
    """How many pages of a range lie in areas."""
    return slot.areas.count(np.array([vpn]), np.array([vpn + npages]))


def _merged_refs(domain: Domain, slot: MmSlot, vpn: int, npages: int) -> Ints:
    """Refs of the merged pages of a range, in the order of memory."""
    parts = [refs[IS_MERGED[domain.state[refs]]] for _, refs in domain.known(slot, vpn, npages)]
    return np.concatenate([NONE, *parts])


def _merged_in(domain: Domain, slot: MmSlot, vpn: int, npages: int) -> int:
    return len(_merged_refs(domain, slot, vpn, npages))


class _Runs:
    """Cuts a range for breaking: as the process gets on, and short where pages are known to be merged or were.

    Ranges without such pages are not skipped: pages that came by fork, or from before the service, may not have been
    found yet.
    """

    def __init__(self, domain: Domain, slot: MmSlot, vpn: int, npages: int) -> None:
        self._slot = slot
        self._left = deque(_ranges(domain, slot, vpn, npages))
        self._copied = 0

    def next(self) -> tuple[int, int] | None:
        """(vpn, pages); None after the last."""
        if not self._left:
            return None
        vpn, n = self._left.popleft()
        most = self._slot.break_pages
        if n > most:
            self._left.appendleft((vpn + most, n - most))
        return vpn, min(n, most)

    def heard(self, result: BreakResult) -> None:
        """What the process answered for the last one. AddressSpaceGone: it cannot have copied so many pages."""
        self._copied += result.pages_unmerged
        self._slot.expect(self._copied)


def _ranges(domain: Domain, slot: MmSlot, vpn: int, npages: int) -> Iterator[tuple[int, int]]:
    """Runs of pages: of `BREAK_PAGES` at most where one of them is merged or was, and all that lies between them."""
    low, high = slot.areas.cut(np.array([vpn]), np.array([vpn + npages]))
    blocks = deque(_merged_blocks(domain, slot, vpn, npages, low))
    for start, end in zip(low.tolist(), high.tolist(), strict=True):
        pending = start
        while blocks and blocks[0] < end:
            at = blocks.popleft()
            if pending < at:
                yield pending, at - pending
            pending = min(at + BREAK_PAGES, end)
            yield at, pending - at
        if pending < end:
            yield pending, end - pending


def _merged_blocks(domain: Domain, slot: MmSlot, vpn: int, npages: int, low: Ints) -> list[int]:
    """Where, of the blocks of `BREAK_PAGES` from each of `low` on, those begin that have merged pages or broken ones,
    which are restored on this occasion."""
    found = [NONE]
    for vpns, refs in domain.known(slot, vpn, npages):
        state = domain.state[refs]
        vpns = vpns[IS_MERGED[state] | (state == PageState.BROKEN)]
        start = low[np.searchsorted(low, vpns, "right") - 1]
        found.append(np.unique(start + (vpns - start) // BREAK_PAGES * BREAK_PAGES))
    return np.unique(np.concatenate(found)).tolist()  # type: ignore[no-any-return]


def _ask(slot: MmSlot, vpn: int, npages: int) -> BreakResult:
    with slot.waited_for() as wait:
        result = slot.space.break_ksm(vpn, npages)
        wait.free += 1.0 * (npages <= BREAK_PAGES) + result.pages_unmerged * PAGE_SIZE / BREAK_RATE
    slot.faults += result.errno == errno.EFAULT
    if wait.took > BREAK_SLOW:
        slot.break_pages = max(min(npages, slot.break_pages) // 4, BREAK_FEW)
    elif wait.took < BREAK_QUICK and npages == slot.break_pages:
        slot.break_pages *= 2
    if result.pages_unmerged:
        slot.break_pages = min(slot.break_pages, BREAK_PAGES)
    return result


def _break_range(domain: Domain, slot: MmSlot, vpn: int, npages: int, leave_alone: bool) -> BreakResult:
    """Break one range (break_ksm)."""
    return _take_in(domain, slot, vpn, npages, _ask(slot, vpn, npages), leave_alone)


def _take_in(
    domain: Domain, slot: MmSlot, vpn: int, npages: int, result: BreakResult, leave_alone: bool
) -> BreakResult:
    """Take in what became of a range that was to be broken. As in break_ksm, EFAULT ends nothing: a page cannot be
    mapped any more. So ksmd asks for the areas again, and halves what is left of the range until the bad page stands
    alone. That page is not unmerged, and stays in the books as merged: if ksmd forgot it, nobody would unmerge it
    later. Without an error, `pages_remaining` are such pages.
    """
    if not result.errno:
        _unmerged(domain, slot, _merged_refs(domain, slot, vpn, npages), leave_alone)
        return result
    # Breaking goes from low to high. Pages the application broke meanwhile are not in the count, so at least
    # these are done; of the others nothing is claimed.
    _unmerged(domain, slot, _merged_refs(domain, slot, vpn, npages)[: result.pages_unmerged], leave_alone)
    if result.errno != errno.EFAULT:
        return result
    refresh_areas(domain, slot)
    if npages == 1 or slot.faults > FAULTS_MAX:
        there = _pages_in(slot, vpn, npages)
        known = _merged_in(domain, slot, vpn, npages)
        return BreakResult(0, result.pages_unmerged, max(known, min(result.pages_remaining, there)))
    done, left = result.pages_unmerged, 0
    for start, n in ((vpn, npages // 2), (vpn + npages // 2, npages - npages // 2)):
        if not _pages_in(slot, start, n):
            continue
        half = _break_range(domain, slot, start, n, leave_alone)
        done += half.pages_unmerged
        left += half.pages_remaining
        if half.errno:
            return replace(half, pages_unmerged=done, pages_remaining=left)
    return BreakResult(0, done, left)


def _unmerged(domain: Domain, slot: MmSlot, refs: Ints, leave_alone: bool) -> None:
    """Pages that have private copies now. What is in them is known without hashing: what was in the node."""
    if not len(refs):
        return
    checksums = domain.checksum[refs].copy()
    has_node = HAS_NODE[domain.state[refs]]
    checksums[has_node] = domain.stable.checksum[checksums[has_node].astype(np.int64)]
    unknown = has_node & (checksums == 0)  # an adopted segment's
    domain.withdraw(slot, refs)
    domain.set_state(slot, refs[unknown], PageState.BROKEN)
    refs, checksums = refs[~unknown], checksums[~unknown]
    domain.changed(slot, refs, checksums)
    if leave_alone:
        domain.set_state(slot, refs, PageState.ALONE)


def retry_pending(domain: Domain, slot: MmSlot, passes: int) -> None:
    """Try again to break what was to be unmerged and could not be (a ksm page "left over from a break_ksm which
    failed"), after twice as many passes as the last time."""
    if not slot.pending_breaks or passes < slot.pending_due:
        return
    pending, slot.pending_breaks = slot.pending_breaks, []
    for n, (vpn, npages) in enumerate(pending):
        try:
            row, _ = unmerge_pages(domain, slot, vpn, npages, lambda: False, leave_alone=True)
        except AddressSpaceGone:
            slot.pending_breaks += pending[n:]
            raise
        if row.errno:
            slot.pending_breaks.append((vpn, npages))
    if slot.pending_breaks:
        slot.pending_due = passes + (1 << min(slot.pending_attempts, 6))
        slot.pending_attempts += 1
    else:
        slot.pending_attempts = 0


def free_sparse_segments(domain: Domain, passes: int) -> None:
    """Free the segments that are mostly dead, if that is worth the trouble. (The kernel does the like to stale stable
    nodes, each of which holds one page; here a segment holds many.)"""
    if domain.stable.dead_nodes < SPARSE_PAGES:
        return
    sparse = [
        (segment.base, segment.base + segment.rows, segment.dead)
        for segment in domain.stable.segments
        if segment.handle and segment.live < SPARSE_SHARE * segment.size and passes - segment.born > SPARSE_PASSES
    ]
    if sum(dead for _, _, dead in sparse) < SPARSE_PAGES:
        return
    for first, past, _ in sparse:
        if not _move_out(domain, (first, past)):
            return


def _move_out(domain: Domain, nodes: tuple[int, int]) -> bool:
    """Break the last users of the nodes [first, past the last) of a segment that is mostly dead. Their pages become
    candidates again, and the segment is freed. Returns False at the first error.
    """
    for slot in [s for s in domain.slots if not s.is_away]:
        for vpn, npages in list(_users(domain, slot, nodes)):
            if slot.is_away:
                break
            try:
                slot.faults = 0
                if not _break_run(domain, slot, vpn, vpn + npages):
                    return False
            except AddressSpaceGone as e:
                slot.lose(e)
    return True


def _break_run(domain: Domain, slot: MmSlot, vpn: int, end: int) -> bool:
    """Break merged pages [vpn, end), at the process's pace. False: not all of them."""
    while vpn < end:
        n = min(slot.break_pages, end - vpn)
        result = _break_range(domain, slot, vpn, n, leave_alone=False)
        if result.errno or result.pages_remaining:
            return False
        vpn += n
    return True


def _users(domain: Domain, slot: MmSlot, nodes: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Runs of pages (vpn, npages) of a process that are merged with the nodes."""
    for vpns, refs in domain.known(slot):
        node = domain.checksum[refs]
        vpns = vpns[HAS_NODE[domain.state[refs]] & (node >= nodes[0]) & (node < nodes[1])]
        first = run_starts(vpns)
        lengths = np.diff(np.append(first, len(vpns)))
        yield from zip(vpns[first].tolist(), lengths.tolist(), strict=True)
