"""Refs: which row of the books is which page of which process.

A process has areas. Of those of its pages that it reported, ksmd remembers something, in rows whose numbers are refs
(`rmap`). The process's `pieces` say where these pages are. All of it counts against the user's quota.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from samepage.arrays import Ints, expand
from samepage.ksmd.mm_slot import MmSlot, Structured
from samepage.ksmd.pieces import GRANULE, NONE, Stretches, difference
from samepage.ksmd.quota import Quota
from samepage.ksmd.rmap import RmapItems, joined, slices
from samepage.ksmd.stable import SEGMENT_PAGES
from samepage.memory import U8, U32, U64, VPN_END

SWEEP_ROWS = 1 << 12
"""How many refs of pages of which nothing is known any more a process may have, beside some for each known page."""

FEW = 256
"""Runs of refs that are gone through one by one."""


class Refs(ABC):
    """The refs of one merge domain. Everything is touched under `Ksmd.mutex` only."""

    def __init__(self, quota: Quota) -> None:
        self.slots: list[MmSlot] = []
        self.quota = quota
        self._held = (0, 0)  # of the quota: bytes, areas
        self._no_refs()

    def _no_refs(self) -> None:
        """Nothing is known of any page."""
        self.rmap = RmapItems()
        self._owners: tuple[Ints, Ints, list[MmSlot]] | None = None
        self._pieces_bytes = 0

    @abstractmethod
    def forget(self, slot: MmSlot, refs: Ints) -> None:
        """Pages that are gone: nothing is known of them any more."""

    @property
    def checksum(self) -> U64:
        """u64 a ref."""
        return self.rmap.checksum

    @property
    def state(self) -> U8:
        """`PageState` a ref."""
        return self.rmap.state

    def release(self) -> None:
        """Give everything back, after the last of its processes has gone."""
        self.quota.hold(-self._held[0], -self._held[1])
        self._held = (0, 0)
        self.rmap.release()

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
            slot.pieces.add(first, last, _allocate(self.rmap, slot, first, last - first))
            self._hold(0, slot.pieces.nbytes() - before)
        return slot.pieces.locate(start, end)

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
        """Tell the quota what is held now, whatever became of areas and pieces."""
        areas = sum(len(slot.areas) for slot in self.slots)
        pieces_bytes = sum(slot.pieces.nbytes() for slot in self.slots)
        self._hold(areas - self._held[1], pieces_bytes - self._pieces_bytes)

    def held_wrong(self) -> Iterator[str]:
        """Where the books differ from what the quota was told."""
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
            refs, at = _known(self.state, first, n)
            if len(at):
                yield refs + (np.repeat(ahead[part], n)[at] if len(n) > 1 else ahead[part]), refs

    def known_refs(self, base: Ints, npages: Ints) -> Iterator[Ints]:
        """The same of ranges of refs."""
        for _, first, n in slices(base, npages):
            refs, _ = _known(self.state, first, n)
            if len(refs):
                yield refs

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


def _allocate(rmap: RmapItems, slot: MmSlot, vpn: Ints, npages: Ints) -> Ints:
    """First refs for runs of pages. Of long ones the parity of blocks of refs, by which donors take turns, is that
    of blocks of their area."""
    base = np.full(len(vpn), -1, np.int64)
    short = npages < SEGMENT_PAGES
    try:
        for i in np.flatnonzero(~short).tolist():
            base[i] = rmap.allocate(int(npages[i]), slot.areas.offset(int(vpn[i])), 2 * SEGMENT_PAGES)
        if short.any():
            base[short] = rmap.allocate_each(npages[short])
    except MemoryError:
        rmap.free(base[base >= 0], npages[base >= 0])
        raise
    return base


def _known(state: U8, base: Ints, npages: Ints) -> tuple[Ints, Ints]:
    """The refs of these ranges whose state says anything, and their positions among all refs of the ranges."""
    if len(base) == 1:
        at = np.flatnonzero(state[base[0] : base[0] + npages[0]])
        return at + base[0], at
    refs = expand(base, npages)
    at = np.flatnonzero(state[refs])
    return refs[at], at
