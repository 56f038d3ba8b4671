"""What ksmd remembers of each page: nine bytes, in parallel arrays.

Where mm/ksm.c allocates an rmap_item for every page it meets, a page here is a row of two columns: a u64 (`checksum`)
and a u8 (`state`). The row number is called a *ref* and fits in 32 bits. A page has one as soon as anything was told of
it, and the pages around it do (`pieces`). Of what is reported together neighbours in memory are neighbours here.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from samepage.arrays import Bools, Ints, expand
from samepage.memory import PAGE_SIZE, U8, U32, U64

REFS_MAX = 1 << 32
"""Refs are u32, so this many pages can be known in one merge domain (16 TiB of 4 KiB pages)."""

BLOCK = 512
"""Resident memory is counted for this many rows together: the checksums of one page of memory."""

SLICE_PAGES = 1 << 17
"""How many pages are worked on at once (512 MiB of memory), so that temporaries stay small."""


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
        self._first: Ints = np.empty(0, np.int64)  # free ranges [first, last) below `top`: ascending, never adjacent
        self._last: Ints = np.empty(0, np.int64)
        self._top = 0
        self._attach(rows)

    @staticmethod
    def _map(rows: int, dtype: np.dtype[Any]) -> mmap.mmap:
        mapping = mmap.mmap(-1, rows * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapping.madvise(mmap.MADV_NOHUGEPAGE)  # one for one row is what must not happen
        return mapping

    def _attach(self, rows: int) -> None:
        self.columns: list[npt.NDArray[Any]] = [
            np.frombuffer(m, d, rows) for m, d in zip(self._maps, self._dtypes, strict=True)
        ]

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

    def allocate(self, rows: int, phase: int = 0, of: int = 1) -> int:
        """First row of a range of `rows` rows, all zero, that is `phase` by modulus `of`. MemoryError when there is no
        room."""
        first = self._first + (phase - self._first) % of if of > 1 else self._first
        fits = np.flatnonzero(self._last - first >= rows)
        if len(fits):
            i = int(fits[0])
            base = int(first[i])
            self._replace(i, (int(self._first[i]), base), (base + rows, int(self._last[i])))
            return base
        base = self._top + (phase - self._top) % of
        self._grow(base + rows)
        self._replace(len(self._first), (self._top, base))
        self._top = base + rows
        return base

    def _replace(self, i: int, *ranges: tuple[int, int]) -> None:
        """Replace free range `i` by those of these ranges that are not empty."""
        new = np.array([r for r in ranges if r[0] < r[1]], np.int64).reshape(-1, 2)
        self._first = np.concatenate([self._first[:i], new[:, 0], self._first[i + 1 :]])
        self._last = np.concatenate([self._last[:i], new[:, 1], self._last[i + 1 :]])

    def allocate_each(self, lengths: Ints) -> Ints:
        """First rows of several short ranges. They follow one another where there is room for all; but when a quarter
        of the rows is free, what is free is used first, for else whoever gives some back and takes more makes holes of
        it all."""
        total = int(lengths.sum())
        free = self._last - self._first
        if 4 * int(free.sum()) > self._top and not (free >= total).any():
            return self._fill(lengths)
        return self.allocate(total) + np.cumsum(lengths) - lengths

    def _fill(self, lengths: Ints) -> Ints:
        ends = np.cumsum(lengths)
        starts, bases, done = ends - lengths, np.empty(len(lengths), np.int64), 0
        first = self._first.copy()
        for i in np.flatnonzero(self._last - first >= lengths.min()).tolist():
            at = starts[done]
            fits = int(np.searchsorted(ends, at + self._last[i] - first[i], "right"))
            if fits > done:
                bases[done:fits] = first[i] + starts[done:fits] - at
                first[i] += ends[fits - 1] - at
                done = fits
            if done == len(lengths):
                break
        if done < len(lengths):
            self._grow(self._top + int(ends[-1] - starts[done]))
            bases[done:] = self._top + starts[done:] - starts[done]
            self._top = int(bases[-1] + lengths[-1])
        left = first < self._last
        self._first, self._last = first[left], self._last[left]
        return bases

    @property
    def top(self) -> int:
        """Rows from here on are free, and zero."""
        return self._top

    def free_ranges(self) -> tuple[Ints, Ints]:
        """First rows of what is free before `top`, ascending, and the rows after the last."""
        return self._first, self._last

    def keep_only(self, base: Ints, rows: Ints) -> None:
        """Only these ranges (ascending, disjoint) are in use; all other rows are free, and zero."""
        top, end = self._top, base + rows
        self._first = self._last = base[:0]
        first, last = np.append(0, end), np.append(base, max(top, int(end[-1]) if len(end) else 0))
        holes = first < last
        self._top = int(last[-1])
        self.free(first[holes], (last - first)[holes])

    def free(self, base: Ints | int, rows: Ints | int) -> None:
        """Give disjoint ranges (or parts of them) back."""
        first = np.atleast_1d(np.asarray(base, np.int64))
        last = first + rows
        first, last = joined(np.sort(first), np.sort(last))
        if not len(first):
            return
        begin, end = joined(np.sort(np.append(self._first, first)), np.sort(np.append(self._last, last)))
        within = np.searchsorted(begin, first, "right") - 1
        if end[-1] == self._top:  # nothing is in use from here on
            self._top = int(begin[-1])
            self._first, self._last = begin[:-1], end[:-1]
            end = np.append(end[:-1], len(self.columns[0]))
        else:
            self._first, self._last = begin, end
        self._clear(first, last, begin[within], end[within])

    def _clear(self, first: Ints, last: Ints, begin: Ints, end: Ints) -> None:
        """Zero rows [first, last); whole pages inside the free range [begin, end) go back to the kernel."""
        for column, mapping in zip(self.columns, self._maps, strict=True):
            per_page = PAGE_SIZE // column.itemsize
            start = np.maximum(-(-begin // per_page), first // per_page)
            stop = np.minimum(end // per_page, -(-last // per_page))
            whole = start < stop
            for at, past in zip(start[whole].tolist(), stop[whole].tolist(), strict=True):
                mapping.madvise(mmap.MADV_DONTNEED, at * PAGE_SIZE, (past - at) * PAGE_SIZE)
            head = np.where(whole, np.clip(start * per_page, first, last), last)
            tail = np.where(whole, np.clip(stop * per_page, first, last), last)
            for lo, hi in ((first, head), (tail, last)):
                for _, at, n in slices(lo, hi - lo):
                    rows = expand(at, n)
                    rows = rows[column[rows] != 0]  # writing would make memory of nothing
                    column[rows] = 0

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
        """Give all memory back now, without waiting for the garbage collector. The columns must not be used any
        more."""
        self.columns = []
        for mapping in self._maps:
            mapping.close()

    def resident(self) -> int:
        """Bytes of memory behind the rows in use, at most, and for knowing which those are."""
        row = sum(dtype.itemsize for dtype in self._dtypes)
        free = np.maximum(self._last // BLOCK - -(-self._first // BLOCK), 0)
        blocks = -(-self._top // BLOCK) - int(free.sum())
        return blocks * BLOCK * row + self._first.nbytes + self._last.nbytes


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


def slices(starts: Ints, lengths: Ints, most: int = SLICE_PAGES) -> Iterator[tuple[Ints, Ints, Ints]]:
    """Runs a part at a time, of at most `most` in all, the longest cut: which of the runs, their starts, their
    lengths."""
    which = np.flatnonzero(lengths > 0)
    ends = np.cumsum(lengths[which])
    for at in range(0, int(ends[-1]) if len(ends) else 0, most):
        i, j = int(np.searchsorted(ends, at, "right")), int(np.searchsorted(ends, at + most)) + 1
        first, n = starts[which[i:j]], lengths[which[i:j]]
        n[-1] -= max(0, int(ends[min(j, len(ends)) - 1]) - at - most)
        skip = at - int(ends[i]) + int(lengths[which[i]])
        first[0] += skip
        n[0] -= skip
        yield which[i:j], first, n


def joined(starts: Ints, ends: Ints) -> tuple[Ints, Ints]:
    """Ascending disjoint ranges, of which those that meet are made one."""
    meets = np.flatnonzero(starts[1:] == ends[:-1])
    return np.delete(starts, meets + 1), np.delete(ends, meets)


def sorted_refs(parts: list[U32]) -> U32:
    """The refs of all parts, each once, ascending."""
    if not parts:
        return np.empty(0, np.uint32)
    refs = np.sort(np.concatenate(parts), kind="stable")  # hardly any time for what is in order, as parts mostly are
    twice = refs[1:] == refs[:-1]
    if twice.any():
        refs = refs[np.concatenate(([True], ~twice))]
    return refs
