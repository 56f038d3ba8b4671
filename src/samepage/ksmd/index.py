"""Both trees of mm/ksm.c, as one class: things in the order of their checksums.

Where ksm.c keeps red-black trees of pages compared by content, an index here is an array of u32 sorted by
(checksum, number), four bytes an entry. Checksums are not repeated in it: they are read where they already
stand, through `keys`, so an entry must leave the index before its checksum is overwritten.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from samepage.arrays import Bools, Ints
from samepage.memory import U32, U64


def by_checksum(sums: U64) -> tuple[Ints, U64]:
    """The order of checksums, equal ones in that of their positions; and the checksums in that order.

    As np.argsort(sums, kind="stable"), in a third of the time: what is sorted is numbers, positions taking the place of
    their last bits, and hardly ever do two checksums differ in those alone.
    """
    mask = np.uint64((1 << max(1, (len(sums) - 1).bit_length())) - 1)
    keyed = sums & ~mask
    keyed |= np.arange(len(sums), dtype=np.uint64)
    keyed.sort()
    order = (keyed & mask).astype(np.int64)
    in_order = sums[order]
    if (in_order[1:] < in_order[:-1]).any():
        order = np.argsort(sums, kind="stable")
        in_order = sums[order]
    return order, in_order


class ChecksumIndex:
    """Numbers (refs, or stable nodes), looked up by checksum many at a time.

    `keys` gives the column that holds the checksum of each number; it is called anew every time because a
    column moves when it grows.
    """

    def __init__(self, keys: Callable[[], U64]) -> None:
        self._keys = keys
        self.order: U32 = np.empty(0, np.uint32)

    def __len__(self) -> int:
        return len(self.order)

    def nbytes(self) -> int:
        """Bytes of memory this index takes."""
        return self.order.nbytes

    def clear(self) -> None:
        """Forget everything."""
        self.order = np.empty(0, np.uint32)

    def lower_bound(self, sums: U64, numbers: U32 | None = None) -> Ints:
        """For each checksum (and number) the position of the first entry not less than it.

        Ascending `sums` make it several times faster: neighbours then read the same entries, and the cache has them.
        """
        if len(self.order) > 4 * len(sums):
            return self._bisect(sums, numbers)
        position = np.searchsorted(self._keys()[self.order], sums)  # most entries would be read anyway
        if numbers is not None:
            later = np.flatnonzero(self._has(position, sums))
            later = later[self.order[position[later]] < numbers[later]]
            position[later] = self._bisect(sums[later], numbers[later])
        return position

    def _bisect(self, sums: U64, numbers: U32 | None) -> Ints:
        """A binary search for all at once."""
        n, order, keys = len(self.order), self.order, self._keys()
        position = np.zeros(len(sums), np.int64)
        step = 1 << n.bit_length() >> 1
        while step:
            probe = position + (step - 1)
            inside = probe < n
            entry = order[np.minimum(probe, n - 1, out=probe)]
            key = keys[entry]
            less = key < sums
            if numbers is not None:
                less |= (key == sums) & (entry < numbers)
            less &= inside
            position += less * np.int64(step)
            step >>= 1
        return position

    def _has(self, position: Ints, sums: U64) -> Bools:
        if not len(self.order):
            return np.zeros(len(sums), np.bool_)
        entry = self.order[np.minimum(position, len(self.order) - 1)]
        hit: Bools = (position < len(self.order)) & (self._keys()[entry] == sums)
        return hit

    def find(self, sums: U64) -> Ints:
        """For each checksum the lowest number that has it, or -1."""
        found = np.full(len(sums), -1, np.int64)
        if not len(self.order):
            return found
        position = self.lower_bound(sums)
        hit = self._has(position, sums)
        found[hit] = self.order[position[hit]]
        return found

    def count(self, sums: U64) -> Ints:
        """For each checksum how many entries have it."""
        counts = np.zeros(len(sums), np.int64)
        if not len(self.order):
            return counts
        first = self.lower_bound(sums)
        hit = np.flatnonzero(self._has(first, sums))
        last = self.lower_bound(sums[hit], np.full(len(hit), 0xFFFFFFFF, np.uint32))
        counts[hit] = last - first[hit]  # number 2^32 - 1 is never used: REFS_MAX pages would be needed
        return counts

    def entries(self, checksum: int) -> U32:
        """Every number that has this one checksum, ascending."""
        sums = np.array([checksum], np.uint64)
        first, n = int(self.lower_bound(sums)[0]), int(self.count(sums)[0])
        return self.order[first : first + n]

    def insert(self, numbers: U32) -> bool:
        """Add numbers (ascending) that are not in the index. Their checksums must stand in the column already. Returns
        whether one of them has company now, another number of equal checksum."""
        order, in_order = by_checksum(self._keys()[numbers])
        numbers = numbers[order]
        company = bool((in_order[1:] == in_order[:-1]).any())
        if not len(self):
            self.order = numbers
            return company
        position = self.lower_bound(in_order, numbers)
        company = company or bool((self._has(position, in_order) | self._has(position - 1, in_order)).any())
        self.order = np.insert(self.order, position, numbers)
        return company

    def remove(self, numbers: U32) -> U32:
        """Take numbers out; those that are not in the index are ignored. Returns the ones taken out."""
        if not len(self.order) or not len(numbers):
            return np.empty(0, np.uint32)
        order, sums = by_checksum(self._keys()[numbers])
        numbers = numbers[order].astype(np.uint32)
        position = self.lower_bound(sums, numbers)
        there = position < len(self.order)
        there[there] = self.order[position[there]] == numbers[there]
        self.order = np.delete(self.order, position[there])
        return numbers[there]
