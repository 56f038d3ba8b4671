"""Pages of equal content: finding them, and what each page is because of it. Arrays in, arrays out.

Rows are worked through by the first bits of their checksums, a sixteenth at a time, so that what is needed besides the
columns themselves stays small.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from samepage.arrays import Bools, Ints
from samepage.estimate.source import PageFlag
from samepage.memory import U8, U64

PARTS = 16
"""Power of two."""

BLOCK = 1 << 16
"""How many rows are looked at at once, where all have to be."""


class PageClass(IntEnum):
    """What a page is worth to whoever merges. `SHARED` pages cost nothing: their frame counts elsewhere."""

    UNIQUE = 0
    ZERO = 1
    INSIDE = 2
    """Duplicate of a page of the same source, and of no other's."""
    BETWEEN = 3
    """Duplicate of a page of another source."""
    SHARED = 4
    """Shared already: by fork, by the kernel's KSM, by samepage, or the kernel's page of zeros."""
    UNREADABLE = 5


@dataclass(slots=True)
class Groups:
    """Rows of equal checksum: group g is `rows[first[g] : first[g] + size[g]]`, ascending."""

    rows: Ints
    first: Ints
    size: Ints

    def sum(self, values: Bools | Ints) -> Ints:
        """For each group the sum over its rows of `values`, which has one entry a row."""
        if not len(self.first):
            return np.empty(0, np.int64)
        return np.add.reduceat(values.astype(np.int64), self.first)

    def spread(self, values: Ints | Bools) -> Ints:
        """For each row the entry of `values` (one a group) for its group."""
        return np.repeat(values, self.size)


def representative(flags: U8) -> Bools:
    """Pages whose frame merging could free: they are alone on it, or stand for all pages of it."""
    mask = PageFlag.FRAME | PageFlag.OUTSIDE | PageFlag.KSM | PageFlag.ELSEWHERE | PageFlag.UNREADABLE
    out: Bools = (flags & mask) == PageFlag.FRAME
    return out


def has_content(flags: U8) -> Bools:
    """Pages whose checksum is known."""
    out: Bools = flags & (PageFlag.ELSEWHERE | PageFlag.UNREADABLE) == 0
    return out


def equal_groups(checksum: U64, member: Bools) -> Iterator[Groups]:
    """All groups of two and more equal `member` rows, in parts. Each group is whole in one part."""
    shift = np.uint64(64 - PARTS.bit_length() + 1)
    for part in range(PARTS):
        rows = np.concatenate(
            [
                np.flatnonzero((checksum[at : at + BLOCK] >> shift == part) & member[at : at + BLOCK]) + at
                for at in range(0, len(checksum), BLOCK)
            ]
            or [np.empty(0, np.int64)]
        )
        yield _groups(checksum[rows], rows)


def _groups(sums: U64, rows: Ints) -> Groups:
    order = np.argsort(sums)
    sums, rows = sums[order], rows[order]
    equal = sums[1:] == sums[:-1]
    grouped = np.zeros(len(sums), np.bool_)
    grouped[1:] |= equal
    grouped[:-1] |= equal
    starts = np.ones(len(sums), np.bool_)
    starts[1:] = ~equal
    starts, rows = starts[grouped], rows[grouped]
    # Ascending rows in every group: one sort of both numbers in one.
    number = np.cumsum(starts) - 1
    rows = np.sort((number << 32) | rows) & 0xFFFFFFFF
    first = np.flatnonzero(starts)
    return Groups(rows, first, np.diff(np.append(first, len(rows))))


def distinct_frames(groups: Groups, flags: U8, frames_known: bool) -> Ints:
    """How many different frames each group has at least."""
    frame = flags[groups.rows] & PageFlag.FRAME != 0
    count = groups.sum(frame)
    if not frames_known:  # pages that share a frame with nobody knows whom: there must be one, and it is no other's
        count += groups.size > count
    return count


def base_classes(checksum: U64, flags: U8, zero_checksum: int) -> U8:
    """The `PageClass` of each page while nothing is known of duplicates."""
    classes = np.empty(len(flags), np.uint8)
    for at in range(0, len(flags), BLOCK):
        part, sums = flags[at : at + BLOCK], checksum[at : at + BLOCK]
        own = representative(part)
        out = np.where(own, np.where(sums == zero_checksum, PageClass.ZERO, PageClass.UNIQUE), PageClass.SHARED)
        out[part & PageFlag.UNREADABLE != 0] = PageClass.UNREADABLE
        classes[at : at + BLOCK] = out
    return classes


def mark_duplicates(groups: Groups, classes: U8, flags: U8, source: Ints, distinct: Ints, frames_known: bool) -> None:
    """Set INSIDE and BETWEEN for the rows of groups that have more than one frame. `source`: of each row of
    `groups`."""
    if not len(groups.first):
        return
    # Whose frames they are: other pages of a frame are shared already.
    counts = flags[groups.rows] & (PageFlag.FRAME if frames_known else PageFlag.FRAME | PageFlag.OUTSIDE) != 0
    lowest = np.minimum.reduceat(np.where(counts, source, np.iinfo(np.int64).max), groups.first)
    highest = np.maximum.reduceat(np.where(counts, source, -1), groups.first)
    between = lowest < highest
    value = np.where(between, PageClass.BETWEEN, PageClass.INSIDE)
    value[distinct < 2] = PageClass.UNIQUE
    each = groups.spread(value)
    mine = (classes[groups.rows] == PageClass.UNIQUE) & (each != PageClass.UNIQUE)
    classes[groups.rows[mine]] = each[mine]
