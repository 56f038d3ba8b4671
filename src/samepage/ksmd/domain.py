"""A merge domain: everything ksmd knows of the processes that may share pages with one another.

Nothing here is reachable from another domain. That is how pages of different owners are kept from being
compared: not by a check that could be forgotten, but because there is nothing to compare them with.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from samepage.arrays import Ints, expand
from samepage.ksmd.age import Ages
from samepage.ksmd.deferred import Deferred
from samepage.ksmd.index import ChecksumIndex
from samepage.ksmd.mm_slot import PIECE, MmSlot, Structured
from samepage.ksmd.patience import Patience
from samepage.ksmd.rmap import BLOCK, HAS_CHECKSUM, HAS_NODE, IS_VOLATILE, VOLATILE, PageState, RmapItems, sorted_refs
from samepage.ksmd.stable import StableTree
from samepage.memory import AREA, U8, U32, U64

SLICE_PAGES = 1 << 17
"""Pages worked on at once (512 MiB of memory), so that temporaries stay small whatever the number of pages."""

AREAS_MAX = 1 << 20
"""Areas of all processes of one domain."""

RESIDENT_MAX = 4 * 9 * os.sysconf("SC_PHYS_PAGES")
"""Bytes that the pages known in one domain may take, or no new ones are: 9 for each, were every page of the machine in
four processes. Whoever makes processes up must not fill the service's memory."""

CANDIDATE = HAS_CHECKSUM.copy()
"""States a page that was put aside as a candidate may still be in when its turn comes."""
CANDIDATE[[PageState.UNSHARED, PageState.ALONE]] = False


class Domain:
    """State of one merge domain. Everything is touched under `Ksmd.mutex` only."""

    def __init__(self, number: int, patience: Patience | None = None, is_foreign: bool = False) -> None:
        self.number = number
        self.slots: list[MmSlot] = []
        self.patience = patience or Patience(most=30.0, regain=0.05)
        self.is_foreign = is_foreign
        """Of a user that the service has for guest."""
        self._begin()

    def _begin(self) -> None:
        """Nothing is known of any page."""
        self.rmap = RmapItems()
        self.stable = StableTree()
        self.unstable = ChecksumIndex(lambda: self.rmap.checksum)
        self.deferred = Deferred()
        self.parity = 0
        self.changed_now: list[U32] = []  # refs whose checksum was new in this pass,
        self.changed_before: list[U32] = []  # and in the one before: candidates at its end, if still the same
        self.skipped: list[
            tuple[int, U32]
        ] = []  # refs that changed and are not looked at, until the pass of that number
        self.candidates: deque[U32] = deque()  # to be matched, in parts
        self._table: tuple[Ints, Ints, Ints, list[MmSlot]] | None = None

    @property
    def checksum(self) -> U64:
        """u64 a ref."""
        return self.rmap.checksum

    @property
    def state(self) -> U8:
        """`PageState` a ref."""
        return self.rmap.state

    def nbytes(self) -> int:
        """Bytes of memory all this takes, temporaries aside."""
        lists = [*self.changed_now, *self.changed_before, *self.candidates, *(refs for _, refs in self.skipped)]
        indexes = self.unstable.nbytes() + self.stable.nbytes() + self.deferred.nbytes()
        slots = sum(slot.pieces.nbytes + slot.counts.nbytes + slot.ages.nbytes() for slot in self.slots)
        return self.rmap.resident() + indexes + slots + sum(part.nbytes for part in lists)

    @property
    def is_full(self) -> bool:
        """Whether no page is to be known that was not yet."""
        return self.rmap.resident() > RESIDENT_MAX

    def release(self) -> None:
        """The last of its processes has gone."""
        self.stable.release()
        self.rmap.release()

    def abandon(self) -> None:
        """Forget all that is known of its processes."""
        with contextlib.suppress(Exception):
            self.release()
        self._begin()
        for slot in self.slots:
            slot.pieces, slot.ages = slot.pieces[:0], Ages()
            slot.counts[:] = 0

    # -- areas and refs ---------------------------------------------------------------------------------

    def set_areas(self, slot: MmSlot, areas: Structured) -> None:
        """Fit the refs of a slot to its areas. MemoryError when there are too many of either."""
        if len(areas) + sum(len(s.pieces) for s in self.slots if s is not slot) > AREAS_MAX:
            raise MemoryError(f"more than {AREAS_MAX} areas in one merge domain")
        kept, fell_out, no_refs = slot.recut(areas)
        new = self._allocate(no_refs)
        self._forget_ranges(slot, fell_out["vpn"], fell_out["npages"])
        slot.pieces = kept
        self._table = None
        slot.ages.forget(no_refs)
        if new:
            slot.extend(new)

    def _allocate(self, runs: Structured) -> list[tuple[int, int, int]]:
        """Refs for runs of pages: (vpn, npages, first ref). MemoryError, with none of them taken."""
        new: list[tuple[int, int, int]] = []
        try:
            for vpn, npages in runs.tolist():
                new.append((vpn, npages, self.rmap.allocate(npages)))
        except MemoryError:
            for _, npages, base in reversed(new):
                self.rmap.free(base, npages)
            raise
        return new

    def _forget_ranges(self, slot: MmSlot, base: npt.NDArray[Any], npages: npt.NDArray[Any]) -> None:
        """Forget disjoint ranges of refs, of which there may be very many that are short."""
        order = np.argsort(base)
        start, end = base[order].astype(np.int64), (base + npages)[order].astype(np.int64)
        joined = np.flatnonzero(start[1:] == end[:-1])
        start, end = np.delete(start, joined + 1), np.delete(end, joined)
        for refs in self.known(start, end - start):
            self.forget(slot, refs)
        for first, last in zip(start.tolist(), end.tolist(), strict=True):
            self.rmap.free(first, last - first)

    def known(self, base: Ints, npages: Ints) -> Iterator[Ints]:
        """The refs of these ranges that stand for pages of which something is known, at most `SLICE_PAGES` at a time.
        Ranges come from processes, which may claim what they like: nothing may be done for each page of a range."""
        short = np.flatnonzero(npages <= BLOCK)
        step = SLICE_PAGES // BLOCK
        for part in (short[at : at + step] for at in range(0, len(short), step)):  # numpy is slow with one at a time
            refs = expand(base[part], npages[part])
            refs = refs[self.state[refs] != PageState.UNTOUCHED]
            if len(refs):
                yield refs
        for i in np.flatnonzero(npages > BLOCK).tolist():
            for first, last in self.known_slices(int(base[i]), int(base[i] + npages[i])):
                refs = np.flatnonzero(self.state[first:last]) + first
                if len(refs):
                    yield refs

    def known_slices(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """The slices of refs [first, last) with pages of which something may be known, ascending."""
        for start, end in self.rmap.used(first, last):
            for at in range(start, end, SLICE_PAGES):
                yield at, min(at + SLICE_PAGES, end)

    def known_parts(self, slot: MmSlot, vpn: int, npages: int) -> Iterator[tuple[int, int, int]]:
        """The same of a range of pages, as (vpn, ref, pages), in the order of memory."""
        whole = np.array([(vpn, npages)], AREA)
        _, low, ref, length = slot.locate(whole["vpn"], whole["npages"])
        for at, base, n in zip(low.tolist(), ref.tolist(), length.tolist(), strict=True):
            for first, last in self.known_slices(base, base + n):
                yield at + first - base, first, last - first

    def drop(self, slot: MmSlot) -> None:
        """Forget a slot and all its pages (remove_trailing_rmap_items)."""
        self._forget_ranges(slot, slot.pieces["base"], slot.pieces["npages"])
        slot.pieces = slot.pieces[:0]
        self.slots.remove(slot)
        self._table = None

    def forget_table(self) -> None:
        """The pieces may have changed."""
        self._table = None

    def table(self) -> tuple[Ints, Ints, Ints, list[MmSlot]]:
        """Every piece of the domain in the order of refs: first ref, ref past the last, first vpn, slot."""
        if self._table is None:
            pieces = np.concatenate([slot.pieces for slot in self.slots] or [np.empty(0, PIECE)])
            whose = np.repeat(np.arange(len(self.slots)), [len(slot.pieces) for slot in self.slots])
            order = np.argsort(pieces["base"], kind="stable")
            vpn, npages, base = (pieces[name][order].astype(np.int64) for name in ("vpn", "npages", "base"))
            self._table = (base, base + npages, vpn, [self.slots[i] for i in whose[order].tolist()])
        return self._table

    def cut(self, refs: U32 | Ints) -> Iterator[tuple[MmSlot, int, slice]]:
        """Cut ascending refs along the pieces: the slot, what to add to a ref for its vpn, which of `refs`."""
        bases, _, vpns, slots = self.table()
        bounds = np.append(np.searchsorted(refs, bases.astype(refs.dtype)), len(refs))
        for i in np.flatnonzero(np.diff(bounds)):
            yield slots[i], int(vpns[i] - bases[i]), slice(int(bounds[i]), int(bounds[i + 1]))

    def by_slot(self, refs: U32 | Ints) -> dict[MmSlot, Ints]:
        """Positions of ascending `refs`, by slot, ascending."""
        parts: dict[MmSlot, list[tuple[int, int]]] = {}
        for slot, _, part in self.cut(refs):
            parts.setdefault(slot, []).append((part.start, part.stop - part.start))
        return {slot: expand(*np.array(runs, np.int64).T) for slot, runs in parts.items()}

    # -- what a page is ---------------------------------------------------------------------------------

    def set_state(self, slot: MmSlot, refs: U32 | Ints, state: PageState) -> None:
        """Make pages of one slot something else, and count them as that."""
        if not len(refs):
            return
        slot.counts -= np.bincount(self.state[refs], minlength=len(slot.counts))
        slot.counts[state] += len(refs)
        self.state[refs] = state

    def set_states(self, refs: U32 | Ints, state: PageState) -> None:
        """The same for ascending refs of any slots."""
        for slot, _, part in self.cut(refs):
            self.set_state(slot, refs[part], state)

    def forget(self, slot: MmSlot, refs: Ints) -> None:
        """Pages that are gone: nothing is known of them any more."""
        self.withdraw(slot, refs)
        self.set_state(slot, refs, PageState.UNTOUCHED)

    def withdraw(self, slot: MmSlot, refs: Ints) -> int:
        """Take pages of one slot out of both trees, before they become something else.

        Returns how many of them were merged. The state is the caller's to change, at once.
        """
        state = self.state[refs]
        self.unstable.remove(refs[state == PageState.UNSHARED].astype(np.uint32))
        has_node = HAS_NODE[state]
        if has_node.any():
            self._bequeath(slot, refs[state == PageState.MERGED])
            self.stable.detach(self.checksum[refs[has_node]].astype(np.int64))
        return int(np.count_nonzero(has_node)) + int(np.count_nonzero(state == PageState.ZERO))

    def _bequeath(self, slot: MmSlot, refs: Ints) -> None:
        """Where a page that leaves its node has heirs by fork and nobody else stands in for them, one of them takes its
        place as the page that was merged. So, of pages that would be one without us, exactly one counts as saved."""
        others = [s for s in self.slots if s is not slot]
        if not len(refs) or not any(s.counts[PageState.INHERITED] for s in others):
            return
        vpns, nodes = slot.vpns_of(refs), self.checksum[refs]
        for state in (PageState.MERGED, PageState.INHERITED):
            for other in others:
                if not other.counts[state]:
                    continue
                theirs = other.refs_of(vpns)
                at = np.flatnonzero(theirs >= 0)
                at = at[(self.state[theirs[at]] == state) & (self.checksum[theirs[at]] == nodes[at])]
                self.set_state(other, theirs[at], PageState.MERGED)
                vpns, nodes = np.delete(vpns, at), np.delete(nodes, at)

    def inherited(self, slot: MmSlot, vpns: Ints, nodes: Ints) -> Ints:
        """Which of the pages found in `slot` another process has at the same address, merged with the same node."""
        known = np.zeros(len(vpns), np.bool_)
        for other in self.slots:
            if other is slot or not other.merged:
                continue
            theirs = other.refs_of(vpns)
            at = np.flatnonzero(theirs >= 0)
            refs = theirs[at]
            known[at] |= HAS_NODE[self.state[refs]] & (self.checksum[refs].astype(np.int64) == nodes[at])
        return np.flatnonzero(known)

    def changed(self, slot: MmSlot, refs: Ints, checksums: U64) -> None:
        """Pages (in neither tree) whose content is new: candidates if they stay so for a whole pass."""
        self.rmap.touch(refs)
        self.checksum[refs] = checksums
        self.set_state(slot, refs, VOLATILE[self.parity])
        self.changed_now.append(refs.astype(np.uint32))

    # -- candidates -------------------------------------------------------------------------------------

    def end_pass(self, passes: int) -> None:
        """What was new one pass ago and did not change since becomes a candidate; so does what was deferred."""
        self.candidates.extend(self.changed_before)
        self.candidates.extend(self.deferred.due(passes))
        self._set_skipped_aside(passes)
        self.changed_before, self.changed_now = self.changed_now, []
        self.parity ^= 1

    def _set_skipped_aside(self, passes: int) -> None:
        """What changed in this pass and is not looked at in the next waits for the look that tells whether it is still
        the same, and is taken to have changed in the pass before that."""
        if any(slot.ages.remaining for slot in self.slots):
            parts, self.changed_now = self.changed_now, []
            for part in parts:
                refs = np.sort(part)
                skips = np.zeros(len(refs), np.uint8)
                for slot, vpn, at in self.cut(refs):
                    skips[at] = slot.ages.remaining_skips(refs[at].astype(np.int64) + vpn)
                for skip in np.flatnonzero(np.bincount(skips)).tolist():
                    these = refs[skips == skip]
                    if skip:
                        self.skipped.append((passes + skip, these))
                    else:
                        self.changed_now.append(these)
        due = [refs for until, refs in self.skipped if until <= passes]
        if due:
            self.skipped = [entry for entry in self.skipped if entry[0] > passes]
            refs = sorted_refs(due)
            refs = refs[IS_VOLATILE[self.state[refs]]]
            self.set_states(refs, VOLATILE[self.parity])
            self.changed_now.append(refs)

    def next_candidates(self) -> U32:
        """The next slice of candidates, ascending; empty when there are none left."""
        parts: list[U32] = []
        taken = 0
        while self.candidates and taken < SLICE_PAGES:
            part = self.candidates.popleft()
            if taken + len(part) > SLICE_PAGES:
                part, rest = part[: SLICE_PAGES - taken], part[SLICE_PAGES - taken :]
                self.candidates.appendleft(rest)
            # What changed in the pass just over has the other parity, and waits for one pass more.
            state = self.state[part]
            part = part[CANDIDATE[state] & (state != VOLATILE[self.parity ^ 1])]
            parts.append(part)
            taken += len(part)
        return sorted_refs(parts)

    def start_afresh(self) -> None:
        """After everything was unmerged: nothing is known but checksums, and every page is a candidate anew."""
        self.unstable.clear()
        self.deferred = Deferred()
        self.candidates.clear()
        self.changed_now, self.changed_before, self.skipped = [], [], []
        for slot in self.slots:
            slot.ages, slot.aside = Ages(), []
            for refs in self.known(slot.pieces["base"].astype(np.int64), slot.pieces["npages"].astype(np.int64)):
                refs = refs[HAS_CHECKSUM[self.state[refs]]]
                self.set_state(slot, refs, PageState.KNOWN)
                if len(refs):
                    self.changed_before.append(refs.astype(np.uint32))
