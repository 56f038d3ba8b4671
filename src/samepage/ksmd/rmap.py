"""What ksmd remembers of each page: nine bytes, in parallel arrays.

Where mm/ksm.c allocates an rmap_item for every page it meets, a page here is a row of two columns: a u64
(`checksum`) and a u8 (`state`). The row number is called a *ref* and fits in 32 bits. Every area of every
process owns one contiguous range of refs, so neighbours in memory are neighbours here.
"""

from __future__ import annotations

import bisect
import mmap
from enum import IntEnum
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from samepage.arrays import Bools, Ints, run_starts
from samepage.memory import PAGE_SIZE, U8, U32, U64

REFS_MAX = 1 << 32
"""Refs are u32: so many pages can be known in one merge domain (16 TiB of 4 KiB pages)."""

BLOCK = 512
"""Rows for which resident memory is counted together: the checksums of one page of memory."""


class PageState(IntEnum):
    """What a page is to ksmd. The comment says what its u64 column holds."""

    UNTOUCHED = 0  # nothing: never reported, or gone
    VOLATILE_EVEN = 1  # checksum, new in a pass of even number
    VOLATILE_ODD = 2  # checksum, new in a pass of odd number
    KNOWN = 3  # checksum, from before everything was unmerged (run = 2); counted nowhere
    UNSHARED = 4  # checksum; stands in the unstable index
    MERGED = 5  # stable node
    INHERITED = 6  # stable node; came by fork, and the parent still has it at the same address
    ZERO = 7  # checksum of the zero page, which it is merged with
    BROKEN = 8  # the pass in which that was found: was merged, was written, and has not been hashed since
    DEFERRED = 9  # checksum; matched, but busy or no memory: tried again later
    OVER_BUDGET = 10  # checksum; matched, but not worth the mappings it costs: tried again later
    COLLIDED = 11  # checksum; compared different from a page of equal checksum, or somebody lied: tried again later
    ALONE = 12  # checksum; refused, or unmerged on request: left alone until it changes


def _table(*states: PageState) -> Bools:
    table = np.zeros(256, np.bool_)
    table[list(states)] = True
    return table


VOLATILE = (PageState.VOLATILE_EVEN, PageState.VOLATILE_ODD)
"""By parity of the pass in which the checksum was new."""

IS_VOLATILE = _table(*VOLATILE)
HAS_NODE = _table(PageState.MERGED, PageState.INHERITED)
IS_MERGED = _table(PageState.MERGED, PageState.INHERITED, PageState.ZERO)
HAS_CHECKSUM = ~_table(PageState.UNTOUCHED, PageState.BROKEN, PageState.MERGED, PageState.INHERITED, PageState.ZERO)


class Columns:
    """Parallel arrays whose rows are handed out in contiguous ranges, and whose memory follows their use.

    The arrays lie in private anonymous mappings: rows nobody wrote cost nothing, and the memory of freed rows
    goes back to the kernel at once. Freed and never used rows read as zero.
    """

    def __init__(self, *dtypes: type[np.generic], rows: int = 1 << 16) -> None:
        self._dtypes = [np.dtype(dtype) for dtype in dtypes]
        self._maps = [self._map(rows, dtype) for dtype in self._dtypes]
        self._free: list[tuple[int, int]] = []  # (base, rows), ascending, never adjacent
        self._longest = 0  # none of them has more rows
        self._next = 0  # where to look first
        self._top = 0
        self._touched = np.zeros(0, np.bool_)
        self._attach(rows)

    @staticmethod
    def _map(rows: int, dtype: np.dtype[Any]) -> mmap.mmap:
        mapping = mmap.mmap(-1, rows * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapping.madvise(mmap.MADV_NOHUGEPAGE)  # one for one row of a sparse area is what must not happen
        return mapping

    def _attach(self, rows: int) -> None:
        self.columns: list[npt.NDArray[Any]] = [
            np.frombuffer(m, d, rows) for m, d in zip(self._maps, self._dtypes, strict=True)
        ]
        touched = np.zeros(-(-rows // BLOCK), np.bool_)
        touched[: len(self._touched)] = self._touched
        self._touched = touched

    def _grow(self, rows: int) -> None:
        """Make room for `rows`. No view of a column may be held across this (`mmap.resize` would refuse)."""
        capacity = len(self.columns[0])
        while capacity < rows:
            capacity *= 2
        if capacity == len(self.columns[0]):
            return
        if rows > REFS_MAX:
            raise MemoryError("more pages than 32-bit refs can name")
        before = len(self.columns[0])
        self.columns = []
        try:
            for mapping, dtype in zip(self._maps, self._dtypes, strict=True):
                mapping.resize(capacity * dtype.itemsize)
                mapping.madvise(mmap.MADV_NOHUGEPAGE)
            before = capacity
        except (OSError, ValueError) as e:
            raise MemoryError(f"no room for {capacity} rows: {e}") from e
        finally:
            self._attach(before)

    def allocate(self, rows: int) -> int:
        """First row of a range of `rows` rows, all zero. MemoryError when there is no room for it."""
        i = self._fit(rows)
        if i is not None:
            base, length = self._free[i]
            self._free[i : i + 1] = [(base + rows, length - rows)] if length > rows else []
            return base
        self._grow(self._top + rows)
        base, self._top = self._top, self._top + rows
        return base

    def _fit(self, rows: int) -> int | None:
        """Which free range has room for `rows` rows. The search goes on where the last one ended, and is not begun
        where none can be found: each of 100,000 areas would else look at what all others left over."""
        if rows > self._longest:
            return None
        for i in chain(range(self._next, len(self._free)), range(min(self._next, len(self._free)))):
            if self._free[i][1] >= rows:
                self._next = i
                return i
        self._longest = rows - 1
        return None

    @property
    def top(self) -> int:
        """Rows from here on are free, and zero."""
        return self._top

    def free_ranges(self) -> list[tuple[int, int]]:
        """(first, rows) of what is free before `top`, ascending."""
        return list(self._free)

    def keep_only(self, ranges: list[tuple[int, int]]) -> None:
        """Only these ranges (first, rows; ascending, disjoint) are in use; all other rows are free, and zero."""
        top = self._top
        self._free, self._top = [], ranges[-1][0] + ranges[-1][1] if ranges else 0
        at = 0
        for base, rows in [*ranges, (top, 0)]:
            if at < base:
                if base < self._top:
                    self._free.append((at, base - at))
                    self._longest = max(self._longest, base - at)
                self._clear(at, base - at, at, base)
            at = base + rows

    def touch(self, rows: Ints) -> None:
        """Say that rows are about to be written (for `resident`)."""
        self._touched[rows // BLOCK] = True

    def used(self, first: int, last: int) -> list[tuple[int, int]]:
        """The stretches of rows [first, last) that may have been written since they were allocated, ascending. The time
        this takes depends on what was written: a bit for each `BLOCK` is all that is read of the rest."""
        low = first // BLOCK
        blocks = np.flatnonzero(self._touched[low : -(-last // BLOCK)]) + low
        at = run_starts(blocks)
        starts, ends = blocks[at] * BLOCK, (blocks[np.append(at[1:], len(blocks))[: len(at)] - 1] + 1) * BLOCK
        return list(zip(np.maximum(starts, first).tolist(), np.minimum(ends, last).tolist(), strict=True))

    def free(self, base: int, rows: int) -> None:
        """Give a range (or part of one) back."""
        at = bisect.bisect_left(self._free, (base, 0))
        first, last = base, base + rows
        if at < len(self._free) and self._free[at][0] == last:
            last += self._free.pop(at)[1]
        if at and sum(self._free[at - 1]) == first:
            at -= 1
            first = self._free.pop(at)[0]
        if last == self._top:  # nothing is in use from here on
            self._top = first
            self._clear(base, rows, first, len(self.columns[0]))
        else:
            self._free.insert(at, (first, last - first))
            self._longest = max(self._longest, last - first)
            self._clear(base, rows, first, last)

    def _clear(self, base: int, rows: int, first: int, last: int) -> None:
        """Zero rows [base, base + rows); whole pages inside the free range [first, last) go back to the kernel."""
        for column, mapping in zip(self.columns, self._maps, strict=True):
            per_page = PAGE_SIZE // column.itemsize
            start = max(-(-first // per_page), base // per_page)
            end = min(last // per_page, -(-(base + rows) // per_page))
            if start < end:
                mapping.madvise(mmap.MADV_DONTNEED, start * PAGE_SIZE, (end - start) * PAGE_SIZE)
            for lo, hi in ((base, min(base + rows, start * per_page)), (max(base, end * per_page), base + rows)):
                if lo < hi and column[lo:hi].any():  # a look first: writing would make memory of nothing
                    column[lo:hi] = 0
        start, end = max(-(-first // BLOCK), base // BLOCK), min(last // BLOCK, -(-(base + rows) // BLOCK))
        if start < end:
            self._touched[start:end] = False

    def widen(self, number: int, dtype: type[np.generic]) -> None:
        """Have a column hold larger numbers from now on. No view of a column may be held across this."""
        rows, used = len(self.columns[number]), np.flatnonzero(self.columns[number])
        mapping = self._map(rows, np.dtype(dtype))
        np.frombuffer(mapping, dtype)[used] = self.columns[number][used]
        self.columns = []
        self._maps[number].close()
        self._maps[number], self._dtypes[number] = mapping, np.dtype(dtype)
        self._attach(rows)

    def release(self) -> None:
        """Give all memory back now, not when the garbage collector comes by. Not to be used any more."""
        self.columns = []
        for mapping in self._maps:
            mapping.close()

    def resident(self) -> int:
        """Bytes of memory behind the rows in use, at most."""
        row = sum(dtype.itemsize for dtype in self._dtypes)
        return int(np.count_nonzero(self._touched)) * BLOCK * row + self._touched.nbytes


class RmapItems(Columns):
    """The pages of one merge domain: `checksum[ref]` and `state[ref]`."""

    def __init__(self) -> None:
        super().__init__(np.uint64, np.uint8)

    @property
    def checksum(self) -> U64:
        """u64 a ref: a checksum, or the number of a stable node (see `PageState`)."""
        return self.columns[0]

    @property
    def state(self) -> U8:
        """`PageState` a ref."""
        return self.columns[1]


def sorted_refs(parts: list[U32]) -> U32:
    """The refs of all parts, each once, ascending."""
    if not parts:
        return np.empty(0, np.uint32)
    refs = np.sort(np.concatenate(parts)) if len(parts) > 1 else np.sort(parts[0])
    twice = refs[1:] == refs[:-1]
    if twice.any():
        refs = refs[np.concatenate(([True], ~twice))]
    return refs
