"""Which memory a pass leaves out: memory that changes between all looks (`smart_scan`).

mm/ksm.c counts for every rmap_item how often a look at it was useless, and skips it for more and more passes
(should_skip_rmap_item, skip_age). Here a whole block is skipped, the range of a huge page. The look itself is cheap.
But it write-protects the page, so that the application's next write to it faults.
"""

from __future__ import annotations

import numpy as np

from samepage.arrays import Ints
from samepage.memory import U8, VPN_END

BLOCK_PAGES = 512
"""Pages of a block. Its first page is a multiple of this."""

RESTLESS_PAGES = BLOCK_PAGES // 4
"""A block is restless when at least so many of its pages changed since the last look."""

SKIPS: U8 = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 4], np.uint8)
"""For each age, how many passes a block is skipped after a look (skip_age). An older block is skipped as many as the
last, which is 8 in the kernel. Memory that comes to rest must be looked at twice before that is known."""


class Ages:
    """The blocks of one process that change all the time. Their age is the number of looks in a row that found them
    changed."""

    def __init__(self) -> None:
        self._block: Ints = np.empty(0, np.int64)  # ascending
        self._age: U8 = np.empty(0, np.uint8)
        self._remaining: U8 = np.empty(0, np.uint8)  # passes for which it is skipped, this one included
        self._found: list[tuple[Ints, Ints]] = []  # blocks in which pages changed in this pass, and how many did
        self._start: Ints = np.empty(0, np.int64)  # what this pass skips, as ranges of pages
        self._end: Ints = np.empty(0, np.int64)

    def nbytes(self) -> int:
        """Bytes of memory this takes."""
        return self._block.nbytes + 2 * self._age.nbytes + 2 * self._start.nbytes

    def begin_pass(self, smart_scan: bool) -> None:
        """Decide what the new pass skips; without `smart_scan`, nothing."""
        if not smart_scan:
            self._remaining[:] = 0
        if self.skipping or len(self._block):
            self._settle()

    def _settle(self) -> None:
        skipped = self._block[self._remaining > 0]
        first = np.flatnonzero(np.diff(skipped, prepend=-2) != 1)
        last = np.append(first[1:], len(skipped))[: len(first)] - 1
        self._start, self._end = skipped[first] * BLOCK_PAGES, (skipped[last] + 1) * BLOCK_PAGES

    @property
    def skipping(self) -> bool:
        """Whether the current pass leaves something out."""
        return bool(len(self._start))

    @property
    def remaining(self) -> bool:
        """Whether the next pass will leave something out."""
        return len(self._block) > 0 and bool(self._remaining.any())

    def ahead(self, vpn: int) -> tuple[int, int]:
        """The first page to look at from `vpn` on, and the page before which that stretch ends."""
        if not len(self._start):
            return vpn, VPN_END
        i = int(np.searchsorted(self._end, vpn, "right"))
        if i < len(self._start) and self._start[i] <= vpn:
            vpn = int(self._end[i])
            i += 1
        return vpn, int(self._start[i]) if i < len(self._start) else VPN_END

    def changed(self, vpns: Ints) -> int:
        """Note that these pages (ascending) were looked at before, and have changed. Returns for how many of them that
        is no news: their blocks are skipped at times."""
        blocks = vpns // BLOCK_PAGES
        first = np.flatnonzero(np.diff(blocks, prepend=-1))
        blocks, counts = blocks[first], np.diff(first, append=len(blocks))
        self._found.append((blocks, counts))
        old = self._block[SKIPS[self._age] > 0]
        if not len(old):
            return 0
        at = np.minimum(np.searchsorted(old, blocks), len(old) - 1)
        return int(counts[old[at] == blocks].sum())

    def end_pass(self, saw_some: bool = False) -> None:
        """End a pass that looked at everything except what it was to skip; `saw_some`: and some of the rest."""
        if not self._found and not len(self._block):
            return
        blocks = np.concatenate([self._block, *(found for found, _ in self._found)])
        counts = np.concatenate([np.zeros(len(self._block), np.int64), *(n for _, n in self._found)])
        self._found = []
        order = np.argsort(blocks, kind="stable")
        blocks, counts = blocks[order], counts[order]
        first = np.flatnonzero(np.diff(blocks, prepend=-1))
        blocks, counts = blocks[first], np.add.reduceat(counts, first)

        known = np.searchsorted(blocks, self._block)
        age, remaining = np.zeros(len(blocks), np.uint8), np.zeros(len(blocks), np.uint8)
        age[known], remaining[known] = self._age, self._remaining
        skipped, restless = remaining > 0, counts >= RESTLESS_PAGES
        remaining[skipped] -= 1
        looked_at = restless & ~skipped
        age[looked_at] = np.minimum(age[looked_at] + 1, len(SKIPS) - 1)
        remaining[looked_at] = SKIPS[age[looked_at]]
        keep = skipped | restless | saw_some
        self._block, self._age, self._remaining = blocks[keep], age[keep], remaining[keep]

    def remaining_skips(self, vpns: Ints) -> U8:
        """For each page, for how many passes from now on it will not be looked at."""
        if not self.remaining:
            return np.zeros(len(vpns), np.uint8)
        at = np.minimum(np.searchsorted(self._block, vpns // BLOCK_PAGES), len(self._block) - 1)
        return np.where(self._block[at] == vpns // BLOCK_PAGES, self._remaining[at], 0).astype(np.uint8)

    def forget(self, first: Ints, end: Ints) -> None:
        """Note that pages [first, end) (ascending) are new: forget the age of their blocks."""
        if not len(self._block) or not len(first):
            return
        run = np.minimum(np.searchsorted(end, self._block * BLOCK_PAGES, "right"), len(first) - 1)
        new = (first[run] < (self._block + 1) * BLOCK_PAGES) & (end[run] > self._block * BLOCK_PAGES)
        self._block, self._age, self._remaining = self._block[~new], self._age[~new], self._remaining[~new]
        self._settle()
