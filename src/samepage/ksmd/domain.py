"""A merge domain: everything ksmd knows of the processes that may share pages with one another.

Nothing here is reachable from another domain. That is how pages of different owners are kept from being
compared: not by a check that could be forgotten, but because there is nothing to compare them with.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator

import numpy as np

from samepage.arrays import Ints, expand
from samepage.ksmd.age import Ages
from samepage.ksmd.deferred import Deferred
from samepage.ksmd.index import ChecksumIndex
from samepage.ksmd.mm_slot import MmSlot, Structured
from samepage.ksmd.patience import Patience
from samepage.ksmd.pieces import GRANULE, NONE, Pieces, Stretches, difference
from samepage.ksmd.quota import Quota
from samepage.ksmd.rmap import (
    HAS_CHECKSUM,
    HAS_NODE,
    IS_VOLATILE,
    SLICE_PAGES,
    VOLATILE,
    PageState,
    RmapItems,
    joined,
    slices,
    sorted_refs,
)
from samepage.ksmd.stable import SEGMENT_PAGES, StableTree
from samepage.memory import U8, U32, U64, VPN_END

SWEEP_ROWS = 1 << 12
"""So many refs a process may have for pages of which nothing is known any more, and some for each that is."""

FEW = 256
"""Runs of refs that are gone through one by one."""

CANDIDATE = HAS_CHECKSUM.copy()
"""States a page that was put aside as a candidate may still be in when its turn comes."""
CANDIDATE[[PageState.UNSHARED, PageState.ALONE]] = False


class Domain:
    """State of one merge domain. Everything is touched under `Ksmd.mutex` only."""

    def __init__(
        self,
        number: int,
        patience: Patience | None = None,
        is_foreign: bool = False,
        quota: Quota | None = None,
    ) -> None:
        self.number = number
        self.slots: list[MmSlot] = []
        self.patience = patience or Patience(most=30.0, regain=0.05)
        self.quota = quota or Quota()
        self._held = (0, 0)  # of the quota: bytes, areas
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
        self._owners: tuple[Ints, Ints, list[MmSlot]] | None = None
        self._pieces_bytes = 0

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
        slots = sum(slot.areas.nbytes() + slot.counts.nbytes + slot.ages.nbytes() for slot in self.slots)
        return self.rmap.resident() + self._pieces_bytes + indexes + slots + sum(part.nbytes for part in lists)

    def release(self) -> None:
        """The last of its processes has gone."""
        self.quota.hold(-self._held[0], -self._held[1])
        self._held = (0, 0)
        self.stable.release()
        self.rmap.release()

    def abandon(self) -> None:
        """Forget all that is known of its processes."""
        with contextlib.suppress(Exception):
            self.release()
        self._begin()
        for slot in self.slots:
            slot.areas, slot.pieces, slot.ages = Stretches(), Pieces(), Ages()
            slot.counts[:] = 0
        self.recount()

    # -- areas and refs ---------------------------------------------------------------------------------

    def set_areas(self, slot: MmSlot, areas: Structured) -> None:
        """These are the areas of a slot now: what is known of pages elsewhere is forgotten. MemoryError when there are
        too many."""
        before, after = slot.areas, Stretches.of(areas)
        if len(after) > len(before) and not self.quota.has_room(len(after) - len(before)):
            raise MemoryError("more areas than one user may have")
        low, high = before.cut(after.start, after.end)
        self._forget_refs(slot, *difference(before.start, before.end, low, high))
        slot.areas = after
        slot.ages.forget(*difference(after.start, after.end, low, high))
        self._hold(len(after) - len(before), 0)

    def cover(self, slot: MmSlot, start: Ints, end: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """Give refs to all pages of these runs (ascending, disjoint) that lie in areas, unless the user has so many
        that no more are to be known. Returns the runs as `Pieces.locate` does. MemoryError when there is no room for so
        many."""
        located = slot.pieces.locate(start, end)
        if int(located[3].sum()) == slot.areas.count(start, end) or self.quota.is_full:
            return located
        first, last = slot.pieces.missing(start, end, slot.areas)
        if len(first):
            before = slot.pieces.nbytes()
            slot.pieces.add(first, last, self._allocate(slot, first, last - first))
            self._hold(0, slot.pieces.nbytes() - before)
        return slot.pieces.locate(start, end)

    def _allocate(self, slot: MmSlot, vpn: Ints, npages: Ints) -> Ints:
        """First refs for runs of pages. Of long ones the parity of blocks of refs, by which donors take turns, is that
        of blocks of their area."""
        base = np.full(len(vpn), -1, np.int64)
        short = npages < SEGMENT_PAGES
        try:
            for i in np.flatnonzero(~short).tolist():
                base[i] = self.rmap.allocate(int(npages[i]), slot.areas.offset(int(vpn[i])), 2 * SEGMENT_PAGES)
            if short.any():
                base[short] = self.rmap.allocate_each(npages[short])
        except MemoryError:
            self.rmap.free(base[base >= 0], npages[base >= 0])
            raise
        return base

    def _forget_refs(self, slot: MmSlot, start: Ints, end: Ints) -> None:
        """Forget pages (ascending disjoint runs), and take their refs back."""
        _, low, ref, npages = slot.pieces.locate(start, end)
        if not len(ref):
            return
        for refs in self.known_refs(ref, npages):
            self.forget(slot, refs)
        before = slot.pieces.nbytes()
        slot.pieces.remove(low, low + npages)
        self.rmap.free(ref, npages)
        self._hold(0, slot.pieces.nbytes() - before)

    def _hold(self, areas: int, pieces_bytes: int) -> None:
        """There are so many areas, and bytes for pieces, more, and refs may have been given or taken back."""
        self._owners = None
        self._pieces_bytes += pieces_bytes
        held = self.rmap.resident() + self._pieces_bytes, self._held[1] + areas
        self.quota.hold(held[0] - self._held[0], areas)
        self._held = held

    def recount(self) -> None:
        """Whatever became of areas and pieces: this is what is held now."""
        areas = sum(len(slot.areas) for slot in self.slots)
        pieces_bytes = sum(slot.pieces.nbytes() for slot in self.slots)
        self._hold(areas - self._held[1], pieces_bytes - self._pieces_bytes)

    def held_wrong(self) -> Iterator[str]:
        """What does not agree with what the quota was told of."""
        areas = sum(len(slot.areas) for slot in self.slots)
        pieces_bytes = sum(slot.pieces.nbytes() for slot in self.slots)
        if (pieces_bytes, areas) != (self._pieces_bytes, self._held[1]):
            yield "areas and pieces are counted wrong"
        if self._held[0] != self.rmap.resident() + pieces_bytes:
            yield "what is held of the quota is counted wrong"

    def drop(self, slot: MmSlot) -> None:
        """Forget a slot and all its pages (remove_trailing_rmap_items)."""
        self._forget_refs(slot, slot.pieces.start, slot.pieces.end)
        self._hold(-len(slot.areas), 0)
        self.slots.remove(slot)

    def sweep(self, slot: MmSlot) -> None:
        """Take back the refs of pages of which nothing is known any more, when there are many: a process may use page
        after page of an area, and discard each."""
        pieces = slot.pieces
        if pieces.npages <= SWEEP_ROWS + 2 * GRANULE * slot.known:
            return
        granules = [np.unique(vpns // GRANULE) for vpns, _ in self.known(slot)]
        keep = np.unique(np.concatenate([NONE, *granules])) * GRANULE
        kept = Stretches(*joined(keep, keep + GRANULE)).cut(pieces.start, pieces.end)
        self._forget_refs(slot, *difference(pieces.start, pieces.end, *kept))

    # -- which refs are whose ---------------------------------------------------------------------------

    def known(self, slot: MmSlot, vpn: int = 0, npages: int = VPN_END) -> Iterator[tuple[Ints, Ints]]:
        """Pages of a range of which something is known, ascending, and their refs: of at most `SLICE_PAGES` at a
        time."""
        _, low, ref, length = slot.pieces.locate(np.array([vpn]), np.array([vpn + npages]))
        ahead = low - ref
        for part, first, n in slices(ref, length):
            refs, at = self._known(first, n)
            if len(at):
                yield refs + (np.repeat(ahead[part], n)[at] if len(n) > 1 else ahead[part]), refs

    def known_refs(self, base: Ints, npages: Ints) -> Iterator[Ints]:
        """The same of ranges of refs."""
        for _, first, n in slices(base, npages):
            refs, _ = self._known(first, n)
            if len(refs):
                yield refs

    def _known(self, base: Ints, npages: Ints) -> tuple[Ints, Ints]:
        """The refs of these ranges whose state says anything, and their positions among all refs of the ranges."""
        if len(base) == 1:
            at = np.flatnonzero(self.state[base[0] : base[0] + npages[0]])
            return at + base[0], at
        refs = expand(base, npages)
        at = np.flatnonzero(self.state[refs])
        return refs[at], at

    def owners(self) -> tuple[Ints, Ints, list[MmSlot]]:
        """Whose refs are whose: the first refs of stretches that are one slot's, ascending; the position of that slot
        in the list that comes last."""
        if self._owners is None:
            first = [slot.pieces.refs()[0] for slot in self.slots]
            whose = np.repeat(np.arange(len(first)), [len(refs) for refs in first])
            bases = np.concatenate([NONE, *first])
            order = np.argsort(bases, kind="stable")
            self._owners = bases[order], whose[order], list(self.slots)
        return self._owners

    def cut(self, refs: U32 | Ints) -> Iterator[tuple[MmSlot, slice | Ints]]:
        """Whose ascending refs are whose: a slot, and which of `refs`. A slot may come more than once."""
        first, whose, slots = self.owners()
        bounds = np.append(np.searchsorted(refs, first.astype(refs.dtype)), len(refs))
        count = np.diff(bounds)
        stretches = np.flatnonzero(count)
        if len(stretches) <= FEW:
            for i in stretches.tolist():
                yield slots[whose[i]], slice(int(bounds[i]), int(bounds[i + 1]))
            return
        of = np.repeat(whose[stretches], count[stretches])
        order = np.argsort(of.astype(np.uint16) if len(slots) < 1 << 16 else of, kind="stable")
        ends = np.cumsum(np.bincount(of, minlength=len(slots)))
        for slot, at in zip(slots, np.split(order, ends[:-1]), strict=True):
            if len(at):
                yield slot, at + int(bounds[0])

    def by_slot(self, refs: U32 | Ints) -> dict[MmSlot, Ints]:
        """Positions of ascending `refs`, by slot, ascending."""
        parts: dict[MmSlot, list[Ints]] = {}
        for slot, at in self.cut(refs):
            parts.setdefault(slot, []).append(np.arange(at.start, at.stop) if isinstance(at, slice) else at)
        return {slot: np.concatenate(part) if len(part) > 1 else part[0] for slot, part in parts.items()}

    def by_memory(self, refs: U32 | Ints) -> dict[MmSlot, tuple[Ints, Ints]]:
        """The same in the order of memory, with the pages that they are. Pages that were told of at different times may
        lie in another order by their refs, and merged in that order would take more mappings."""
        found = {}
        for slot, at in self.by_slot(refs).items():
            vpns = slot.pieces.vpns_of(refs[at].astype(np.int64))
            if (vpns[1:] < vpns[:-1]).any():
                order = np.argsort(vpns, kind="stable")
                at, vpns = at[order], vpns[order]
            found[slot] = at, vpns
        return found

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
        for slot, at in self.cut(refs):
            self.set_state(slot, refs[at], state)

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
        vpns, nodes = slot.pieces.vpns_of(refs), self.checksum[refs]
        for state in (PageState.MERGED, PageState.INHERITED):
            for other in others:
                if not other.counts[state]:
                    continue
                theirs = other.pieces.refs_of(vpns)
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
            theirs = other.pieces.refs_of(vpns)
            at = np.flatnonzero(theirs >= 0)
            refs = theirs[at]
            known[at] |= HAS_NODE[self.state[refs]] & (self.checksum[refs].astype(np.int64) == nodes[at])
        return np.flatnonzero(known)

    def changed(self, slot: MmSlot, refs: Ints, checksums: U64) -> None:
        """Pages (in neither tree) whose content is new: candidates if they stay so for a whole pass."""
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
        for slot in self.slots:
            self.sweep(slot)

    def _set_skipped_aside(self, passes: int) -> None:
        """What changed in this pass and is not looked at in the next waits for the look that tells whether it is still
        the same, and is taken to have changed in the pass before that."""
        if any(slot.ages.remaining for slot in self.slots):
            parts, self.changed_now = self.changed_now, []
            for part in parts:
                refs = np.sort(part[IS_VOLATILE[self.state[part]]])
                skips = np.zeros(len(refs), np.uint8)
                for slot, at in self.by_slot(refs).items():
                    skips[at] = slot.ages.remaining_skips(slot.pieces.vpns_of(refs[at].astype(np.int64)))
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
            for _, refs in self.known(slot):
                refs = refs[HAS_CHECKSUM[self.state[refs]]]
                self.set_state(slot, refs, PageState.KNOWN)
                if len(refs):
                    self.changed_before.append(refs.astype(np.uint32))
