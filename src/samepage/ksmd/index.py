"""Both trees of mm/ksm.c, as one class: things in the order of their checksums.

Where ksm.c keeps red-black trees of pages compared by content, an index here is arrays of u32 sorted by
(checksum, number), about four bytes an entry. Checksums are not repeated in it: they are read where they already
stand, through `keys`, so an entry must leave the index before its checksum is overwritten.

A change costs what it is about, and not what the index holds. There are two arrays: a large one, and a small one with
what came lately, which joins the large one when it has grown. What leaves the large one leaves a gap, which its
neighbour fills: that number then stands there twice, until the gaps are a part of the array that is worth a copy.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from samepage.arrays import Bools, Ints, expand
from samepage.memory import U32, U64

LATELY = 1 << 16
"""Entries that the small array may always have, and gaps the large one."""


def by_checksum(sums: U64) -> tuple[Ints, U64]:
    """The order of checksums, equal ones in that of their positions; and the checksums in that order.

    As np.argsort(sums, kind="stable"), in a third of the time or less: numpy sorts 16 bits by counting. The upper 32
    are sorted so, and hardly ever do two checksums differ in the lower alone.
    """
    parts = sums.view(np.uint16).reshape(-1, 4)
    order = np.argsort(parts[:, 2], kind="stable")
    order = order[np.argsort(parts[:, 3][order], kind="stable")]
    in_order = sums[order]
    wrong = np.flatnonzero(in_order[1:] < in_order[:-1])
    if len(wrong):
        upper = in_order >> np.uint64(32)
        at = np.flatnonzero(np.isin(upper, upper[wrong]))
        order[at] = order[at][np.argsort(in_order[at], kind="stable")]
        in_order[at] = sums[order[at]]
    return order, in_order


class _Sorted:
    """Numbers in the order of (checksum, number). `gaps` of the entries repeat the one before."""

    def __init__(self, keys: Callable[[], U64]) -> None:
        self._keys = keys
        self.entries: U32 = np.empty(0, np.uint32)
        self.gaps = 0

    def numbers(self) -> U32:
        """Each number once."""
        if not self.gaps or not len(self.entries):
            return self.entries
        return self.entries[np.concatenate(([True], self.entries[1:] != self.entries[:-1]))]

    def lower_bound(self, sums: U64, numbers: U32 | None = None) -> Ints:
        """For each checksum (and number) the position of the first entry not less than it.

        Ascending `sums` make it several times faster: neighbours then read the same entries, and the cache has them.
        """
        if len(self.entries) > 4 * len(sums):
            return self._bisect(sums, numbers)
        position = np.searchsorted(self._keys()[self.entries], sums)  # most entries would be read anyway
        if numbers is not None:
            later = np.flatnonzero(self.has(position, sums))
            later = later[self.entries[position[later]] < numbers[later]]
            position[later] = self._bisect(sums[later], numbers[later])
        return position

    def _bisect(self, sums: U64, numbers: U32 | None) -> Ints:
        """A binary search for all at once."""
        n, entries, keys = len(self.entries), self.entries, self._keys()
        position = np.zeros(len(sums), np.int64)
        step = 1 << n.bit_length() >> 1
        while step:
            probe = position + (step - 1)
            inside = probe < n
            entry = entries[np.minimum(probe, n - 1, out=probe)]
            key = keys[entry]
            less = key < sums
            if numbers is not None:
                less |= (key == sums) & (entry < numbers)
            less &= inside
            position += less * np.int64(step)
            step >>= 1
        return position

    def has(self, position: Ints, sums: U64) -> Bools:
        """Whether the entry at each position has that checksum."""
        if not len(self.entries):
            return np.zeros(len(sums), np.bool_)
        entry = self.entries[np.minimum(position, len(self.entries) - 1)]
        hit: Bools = (position < len(self.entries)) & (self._keys()[entry] == sums)
        return hit

    def find(self, sums: U64) -> Ints:
        """For each checksum the lowest number that has it, or -1."""
        found = np.full(len(sums), -1, np.int64)
        if len(self.entries):
            position = self.lower_bound(sums)
            hit = self.has(position, sums)
            found[hit] = self.entries[position[hit]]
        return found

    def all(self, sums: U64) -> tuple[Ints, U32]:
        """Every number that has one of these checksums: the position of that in `sums`, and the number."""
        first = self.lower_bound(sums)
        hit = np.flatnonzero(self.has(first, sums))
        # Number 2^32 - 1 is never used: REFS_MAX pages would be needed.
        past = self.lower_bound(sums[hit], np.full(len(hit), 0xFFFFFFFF, np.uint32))
        length = past - first[hit]
        owner, numbers = np.repeat(hit, length), self.entries[expand(first[hit], length)]
        if self.gaps and len(numbers):
            once = np.concatenate(([True], (numbers[1:] != numbers[:-1]) | (owner[1:] != owner[:-1])))
            owner, numbers = owner[once], numbers[once]
        return owner, numbers

    def insert(self, sums: U64, numbers: U32) -> bool:
        """Add numbers, sorted by checksum. Whether one has company there."""
        if not len(self.entries):
            self.entries = numbers
            return False
        position = self.lower_bound(sums, numbers)
        company = bool((self.has(position, sums) | self.has(position - 1, sums)).any())
        self.entries = np.insert(self.entries, position, numbers)
        return company

    def company(self, sums: U64) -> bool:
        """Whether one of these checksums is there."""
        return bool(len(self.entries)) and bool(self.has(self.lower_bound(sums), sums).any())

    def remove(self, sums: U64, numbers: U32) -> Bools:
        """Take numbers out, sorted by checksum. Which were there."""
        first = self.lower_bound(sums, numbers)
        there: Bools = first < len(self.entries)
        there[there] = self.entries[first[there]] == numbers[there]
        if not there.any():
            return there
        past = self.lower_bound(sums[there], numbers[there] + np.uint32(1)) if self.gaps else first[there] + 1
        first, past = np.sort(first[there]), np.sort(past)
        if self.gaps + len(first) > max(LATELY, len(self.entries) // 8):
            self.entries = np.delete(self.entries, expand(first, past - first))
            self.compact()
        else:
            self._leave_gaps(first, past)
        return there

    def _leave_gaps(self, first: Ints, past: Ints) -> None:
        """Remove stretches, which ascend. Each is filled with what stands behind it; the last, if nothing does, with
        what stands before."""
        self.gaps += len(first)
        begins = np.flatnonzero(np.concatenate(([True], first[1:] != past[:-1])))
        first, past = first[begins], past[np.append(begins[1:] - 1, len(past) - 1)]
        if past[0] - first[0] == len(self.entries):
            self.entries, self.gaps = self.entries[:0].copy(), 0
            return
        fill = np.where(past < len(self.entries), past, first - 1)
        self.entries[expand(first, past - first)] = np.repeat(self.entries[fill], past - first)

    def compact(self) -> None:
        """Close the gaps."""
        self.entries = self.numbers()
        self.gaps = 0

    def in_order(self) -> bool:
        """Whether it is as it must be."""
        numbers, sums = self.numbers().astype(np.int64), self._keys()[self.numbers()]
        ascends = (sums[1:] > sums[:-1]) | ((sums[1:] == sums[:-1]) & (numbers[1:] > numbers[:-1]))
        return bool(ascends.all()) and len(self.entries) - len(numbers) == self.gaps


class ChecksumIndex:
    """Numbers (refs, or stable nodes), looked up by checksum many at a time.

    `keys` gives the column that holds the checksum of each number; it is called anew every time because a
    column moves when it grows.
    """

    def __init__(self, keys: Callable[[], U64]) -> None:
        self._keys = keys
        self._large, self._lately = _Sorted(keys), _Sorted(keys)

    def __len__(self) -> int:
        return len(self._large.entries) - self._large.gaps + len(self._lately.entries)

    def nbytes(self) -> int:
        """Bytes of memory this index takes."""
        return self._large.entries.nbytes + self._lately.entries.nbytes

    def numbers(self) -> U32:
        """All, ascending."""
        return np.sort(np.concatenate([self._large.numbers(), self._lately.entries]))

    def in_order(self) -> bool:
        """Whether it is as it must be: for checks."""
        return self._large.in_order() and self._lately.in_order()

    def clear(self) -> None:
        """Forget everything."""
        self._large, self._lately = _Sorted(self._keys), _Sorted(self._keys)

    def find(self, sums: U64) -> Ints:
        """For each checksum the lowest number that has it, or -1."""
        found, lately = self._large.find(sums), self._lately.find(sums)
        return np.where((found < 0) | ((lately >= 0) & (lately < found)), lately, found)

    def all(self, sums: U64) -> tuple[Ints, U32]:
        """Every number that has one of these checksums, those of one checksum after those of another and ascending: the
        position of that in `sums` (which has none twice), and the number."""
        parts = [level.all(sums) for level in (self._large, self._lately) if len(level.entries)]
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return np.empty(0, np.int64), np.empty(0, np.uint32)
        owner, numbers = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.lexsort((numbers, owner))
        return owner[order], numbers[order]

    def count(self, sums: U64) -> Ints:
        """For each checksum how many entries have it; `sums` has none twice."""
        return np.bincount(self.all(sums)[0], minlength=len(sums))

    def insert(self, numbers: U32) -> bool:
        """Add numbers (ascending) that are not in the index. Their checksums must stand in the column already. Returns
        whether one of them has company now, another number of equal checksum."""
        order, sums = by_checksum(self._keys()[numbers])
        numbers = numbers[order]
        company = bool((sums[1:] == sums[:-1]).any())
        if len(self._lately.entries) + len(numbers) <= max(LATELY, len(self._large.entries) // 64):
            company = company or self._large.company(sums)
            return self._lately.insert(sums, numbers) or company
        company = company or self._lately.company(sums)
        lately = self._lately.entries
        self._lately = _Sorted(self._keys)
        self._large.compact()
        self._large.insert(self._keys()[lately], lately)
        return self._large.insert(sums, numbers) or company

    def remove(self, numbers: U32) -> U32:
        """Take numbers out; those that are not in the index are ignored. Returns the ones taken out."""
        if not len(self) or not len(numbers):
            return np.empty(0, np.uint32)
        order, sums = by_checksum(self._keys()[numbers])
        numbers = numbers[order].astype(np.uint32)
        there = self._large.remove(sums, numbers)
        there |= self._lately.remove(sums, numbers)
        self._lately.compact()  # it is small
        return numbers[there]
