"""Where in memory the refs of a process are.

A process may have any number of pages in its areas, and says of few that there is something in them; so refs are given
to pages that were told of, not to areas. A *piece* is a stretch of pages with refs in a row. Memory that is in use as a
whole has few, for a process tells of some 16,000 pages at a time. A page that is told of alone is given one of
`GRANULE` pages, for its neighbours: then memory that fills up in any order does not end in a piece for each page.

A ref never moves while its page is known, for indexes hold it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from samepage.arrays import Ints
from samepage.ksmd.rmap import joined

GRANULE = 8
"""A page alone takes 72 bytes of columns then and 24 to 40 of a piece. If all memory comes in such pieces, it is 12 to
14 bytes a page."""

PIECE_BYTES = 40
"""24, and what finds the pages of refs."""

MANY = 16
"""Of more refs a piece that ascend, the pieces are looked up in the refs."""

NONE: Ints = np.empty(0, np.int64)


class Stretches:
    """Pages [start, end) each, ascending and disjoint."""

    def __init__(self, start: Ints = NONE, end: Ints = NONE) -> None:
        self.start, self.end = start, end
        self._before = np.cumsum(end - start) - (end - start)

    @classmethod
    def of(cls, runs: npt.NDArray[np.void]) -> Stretches:
        """The stretches of runs of dtype `AREA`."""
        start, npages = (np.ascontiguousarray(runs[name]).astype(np.int64) for name in ("vpn", "npages"))
        return cls(start, start + npages)

    def __len__(self) -> int:
        return len(self.start)

    def nbytes(self) -> int:
        """Bytes of memory this takes."""
        return 3 * self.start.nbytes

    @property
    def npages(self) -> int:
        """All their pages."""
        return int((self.end - self.start).sum())

    def count(self, start: Ints, end: Ints) -> int:
        """How many pages of disjoint runs lie in them."""
        return int((self._below(end) - self._below(start)).sum()) if len(self) else 0

    def offset(self, vpn: int) -> int:
        """How far a page is from the start of the stretch that it lies in."""
        return vpn - int(self.start[np.searchsorted(self.start, vpn, "right") - 1])

    def _below(self, vpn: Ints) -> Ints:
        """How many of their pages lie below each of these."""
        which = np.maximum(np.searchsorted(self.start, vpn, "right") - 1, 0)
        inside = np.clip(vpn - self.start[which], 0, self.end[which] - self.start[which])
        below: Ints = self._before[which] + inside
        return below

    def cut(self, start: Ints, end: Ints) -> tuple[Ints, Ints]:
        """The parts of ascending disjoint runs that lie in them."""
        _, _, low, high = _overlaps(start, end, self.start, self.end)
        return low, high


class Pieces:
    """Page `start + i` is ref `base + i`, before `end`. Ascending by page, disjoint; neighbours in both are one."""

    def __init__(self, start: Ints = NONE, end: Ints = NONE, base: Ints = NONE) -> None:
        self.start, self.end, self.base = start, end, base
        self.npages = int((end - start).sum())
        """All their pages."""
        self._by_base: tuple[Ints, npt.NDArray[Any] | None] | None = None
        self._refs: tuple[Ints, Ints] | None = None

    def __len__(self) -> int:
        return len(self.start)

    def nbytes(self) -> int:
        """Bytes of memory this takes."""
        return PIECE_BYTES * len(self)

    # -- from pages to refs and back --------------------------------------------------------------------

    def locate(self, start: Ints, end: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """Cut ascending disjoint runs of pages along the pieces.

        Returns, for every part that lies in a piece: which run it is of, its first page, its first ref, its pages.
        """
        run, piece, low, high = _overlaps(start, end, self.start, self.end)
        return run, low, self.base[piece] + low - self.start[piece], high - low

    def refs_of(self, vpns: Ints) -> Ints:
        """The ref of each page, or -1 where it has none."""
        if not len(self):
            return np.full(len(vpns), -1, np.int64)
        piece = np.searchsorted(self.start, vpns, "right") - 1
        inside = (piece >= 0) & (vpns < self.end[piece])
        return np.where(inside, self.base[piece] + vpns - self.start[piece], -1)

    def vpns_of(self, refs: Ints) -> Ints:
        """The page of each ref, which must be one of these."""
        base, order = self._in_order()
        start = self.start if order is None else self.start[order]
        if len(base) * MANY < len(refs) and (refs[1:] >= refs[:-1]).all():
            count = np.diff(np.append(np.searchsorted(refs, base), len(refs)))
            vpns: Ints = refs + np.repeat(start - base, count)
            return vpns
        piece = np.searchsorted(base, refs, "right") - 1
        return start[piece] + refs - base[piece]

    def _in_order(self) -> tuple[Ints, npt.NDArray[Any] | None]:
        """The bases, ascending, and which piece each is of; None: that is the order of memory, as it mostly is."""
        if self._by_base is None:
            if (self.base[1:] > self.base[:-1]).all():
                self._by_base = self.base, None
            else:
                order = np.argsort(self.base, kind="stable")  # mostly in order: takes little more time than a look
                self._by_base = self.base[order], order
        return self._by_base

    def refs(self) -> tuple[Ints, Ints]:
        """Their refs, as ascending ranges [first, last)."""
        if self._refs is None:
            base, order = self._in_order()
            length = self.end - self.start
            self._refs = joined(base, base + (length if order is None else length[order]))
        return self._refs

    # -- which there are --------------------------------------------------------------------------------

    def missing(self, start: Ints, end: Ints, areas: Stretches) -> tuple[Ints, Ints]:
        """For ascending disjoint runs of pages, what must be added that all of them which lie in areas have refs, and
        the granules around them, too."""
        start, end = start // GRANULE * GRANULE, -(-end // GRANULE) * GRANULE
        first = np.flatnonzero(np.append(True, start[1:] > end[:-1]))
        start, end = areas.cut(start[first], np.append(end[first[1:] - 1], end[-1:]))
        _, low, _, length = self.locate(start, end)
        return difference(start, end, low, low + length)

    def add(self, start: Ints, end: Ints, base: Ints) -> None:
        """Add what was missing, ascending. It takes time for the pieces between the first and the last of these, and to
        copy the others unless it is at the end, where most is."""
        self.npages += int((end - start).sum())
        i, j = (int(n) for n in np.searchsorted(self.start, (start[0], end[-1])))
        i = max(i - 1, 0)
        j = min(j + 1, len(self))  # the neighbours on both sides may be joined
        start, end, base = (
            np.concatenate([old[i:j], new]) for old, new in ((self.start, start), (self.end, end), (self.base, base))
        )
        order = np.argsort(start, kind="stable")
        start, end, base = start[order], end[order], base[order]
        meets = (start[1:] == end[:-1]) & (base[1:] == base[:-1] + (end - start)[:-1])
        first = np.flatnonzero(np.append(True, ~meets))
        end = end[np.append(first[1:], len(end)) - 1]
        self.start, self.end, self.base = (
            _replaced(old, i, j, new)
            for old, new in ((self.start, start[first]), (self.end, end), (self.base, base[first]))
        )
        self._by_base = self._refs = None

    def remove(self, start: Ints, end: Ints) -> None:
        """Let pages (ascending disjoint runs, each within a piece) have no refs any more."""
        self.npages -= int((end - start).sum())
        left, past = difference(self.start, self.end, start, end)
        piece = np.searchsorted(self.start, left, "right") - 1
        self.base = self.base[piece] + left - self.start[piece]
        self.start, self.end = left, past
        self._by_base = self._refs = None


def _replaced(old: Ints, i: int, j: int, new: Ints) -> Ints:
    """`old` with `new` in the place of [i, j). At the end it has room for more: then `old` may not be used any more."""
    if j < len(old):
        return np.concatenate([old[:i], new, old[j:]])
    n = i + len(new)
    room = old.base if isinstance(old.base, np.ndarray) else old
    if len(room) < n:
        room = np.empty(n + n // 4, np.int64)
        room[:i] = old[:i]
    room[i:n] = new
    return room[:n]


def _overlaps(start: Ints, end: Ints, inner_start: Ints, inner_end: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """What two sets of ascending disjoint ranges have in common: the range in each, and from where to where."""
    first = np.searchsorted(inner_end, start, "right")
    count = np.maximum(np.searchsorted(inner_start, end, "left") - first, 0)
    run = np.repeat(np.arange(len(start)), count)
    inner = np.arange(len(run)) - np.repeat(np.cumsum(count) - count, count) + first[run]
    return run, inner, np.maximum(start[run], inner_start[inner]), np.minimum(end[run], inner_end[inner])


def difference(start: Ints, end: Ints, inner_start: Ints, inner_end: Ints) -> tuple[Ints, Ints]:
    """The parts of ascending disjoint ranges that no inner range covers; every inner range lies within an outer one."""
    begin = np.sort(np.concatenate([start, inner_end]))
    stop = np.sort(np.concatenate([inner_start, end]))
    keep = begin < stop
    return begin[keep], stop[keep]
