"""Looking at all pages but keeping a share of them, and what can be said of the whole then.

That saves memory, but no reading: which pages are equal shows only when all are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from samepage.arrays import Bools, Ints
from samepage.estimate.pages import zero_checksum
from samepage.estimate.source import PageFlag
from samepage.memory import U8, U64

Counts = dict[str, Ints]

STRIDE = 16
"""How many pages there are for each whose checksum is kept whatever it is, to find out what is frequent."""


class Column:
    """A growing array. What was taken from it must not be held while it grows."""

    def __init__(self, dtype: type[np.generic]) -> None:
        self._array: npt.NDArray[Any] = np.empty(1 << 12, dtype)
        self._used = 0

    def extend(self, values: npt.NDArray[Any]) -> None:
        need = self._used + len(values)
        if need > len(self._array):
            # A large array is a mapping, and grows by mremap(2): nothing is copied, and what is not used costs nothing.
            self._array.resize(max(need, len(self._array) * 9 // 8), refcheck=False)
        self._array[self._used : need] = values
        self._used = need

    @property
    def values(self) -> npt.NDArray[Any]:
        return self._array[: self._used]


def threshold(share: float) -> np.uint64:
    """Checksums below it are that share of all."""
    return np.uint64(min(int(share * (1 << 64)), (1 << 64) - 1))


class Sampler:
    """Says which pages are kept: those whose checksum is small, hence of equal pages all or none."""

    def __init__(self, share: float) -> None:
        self.share = share
        self._thinned = 0.0
        self._position = 0
        self._every = Column(np.uint64)

    @property
    def every(self) -> U64:
        """The checksums of every `STRIDE`-th page so far, if it has content of its own and that is not zeros."""
        return self._every.values

    def keep(self, sums: U64, flags: U8) -> Bools:
        """Which of these pages are kept. Of pages whose content says nothing (zeros, or not read), as many as make the
        same share."""
        silent = (sums == np.uint64(zero_checksum())) | (flags & (PageFlag.ELSEWHERE | PageFlag.UNREADABLE) != 0)
        kept: Bools = (sums < threshold(self.share)) & ~silent
        at = np.flatnonzero(silent)
        steps = np.floor(self._thinned + self.share * np.arange(len(at) + 1))
        kept[at[np.diff(steps) > 0]] = True
        self._thinned = (self._thinned + self.share * len(at)) % 1.0
        position = self._position + np.arange(len(sums))
        self._position += len(sums)
        self._every.extend(sums[(position % STRIDE == 0) & ~silent & (flags & PageFlag.FRAME != 0)])
        return kept


@dataclass(slots=True, frozen=True)
class Estimate:
    """A number of pages, and how far off it may be (0: it was counted)."""

    pages: int
    error: int = 0


class Tally:
    """Sums over groups.

    A sample holds a share of all groups, each whole, chosen by checksum: so the sum over it, divided by that share, is
    a sum over all (Horvitz and Thompson), and the squares tell how far off it may be. That goes wrong where a few
    groups are so large that it matters whether they are among it. Those are known: every STRIDE-th page was kept as
    well, whatever its content. They are counted for themselves alone; one that is not in the sample is as large as the
    other half of the kept pages says."""

    FREQUENT = 3
    """A group is large when as many of its pages were kept, of the half that is for deciding that."""

    SIGMAS = 3.0

    def __init__(self, scale: float, every: U64 | None, outcome: Callable[[Ints], Counts]) -> None:
        """`scale`: how many pages a row stands for; `every`: what the `Sampler` kept whatever it was, None if all are
        rows. `outcome`: what is counted of groups of so many pages, of which nothing else is known."""
        self._share = 1 / scale
        self._sums: dict[str, float] = {}
        self._squares: dict[str, float] = {}
        self._largest: dict[str, float] = {}
        self._certain: dict[str, float] = {}
        self._large: U64 = np.empty(0, np.uint64)
        self.unseen = 0
        """Pages of large groups that are not in the sample."""
        if every is not None:
            self._find_large(every, outcome)

    def _find_large(self, every: U64, outcome: Callable[[Ints], Counts]) -> None:
        known, inverse = np.unique(every, return_inverse=True)
        deciding = np.bincount(inverse[::2], minlength=len(known))
        other = np.bincount(inverse[1::2], minlength=len(known))
        large, missing = deciding >= self.FREQUENT, known >= threshold(self._share)
        self._large = known[large]
        count = other[large & missing]
        size = count * 2 * STRIDE
        self.unseen = int(size.sum())
        for name, values in outcome(size).items():
            self._certain[name] = float(values.sum())
            # Of a group of n pages every 2*STRIDE-th is counted: its size is off by the root of that count.
            spread = (values / np.maximum(size, 1)) ** 2 * (2 * STRIDE) ** 2 * np.maximum(count, 1)
            self._squares[name] = float(spread.sum())
        # Not quite as large, and missing too: the sample's own squares know nothing of them.
        count = (deciding + other)[~large & missing]
        for name, values in outcome(count[count >= self.FREQUENT] * STRIDE).items():
            self._squares[name] += float((values**2).sum()) * (1 - self._share) / self._share

    def add(self, checksum: U64, counts: Counts) -> None:
        """Groups, by the checksum of each, and what is counted of each."""
        large = np.isin(checksum, self._large) if len(self._large) else np.zeros(len(checksum), np.bool_)
        factor = (1 - self._share) / self._share**2
        for name, values in counts.items():
            self._certain[name] = self._certain.get(name, 0.0) + float(values[large].sum())
            light = values[~large].astype(np.float64)
            self._sums[name] = self._sums.get(name, 0.0) + float(light.sum())
            self._squares[name] = self._squares.get(name, 0.0) + float((light**2).sum()) * factor
            self._largest[name] = max(self._largest.get(name, 0.0), float(light.max(initial=0)))

    def total(self, name: str) -> Estimate:
        """The sum of what was counted under that name."""
        value = self._sums.get(name, 0.0) / self._share + self._certain.get(name, 0.0)
        if self._share >= 1:
            return Estimate(round(value))
        # One more group like the largest may be in the sample, or have been missed.
        error = self.SIGMAS * self._squares.get(name, 0.0) ** 0.5
        error += self.SIGMAS * max(self._largest.get(name, 0.0), 2.0) / self._share
        return Estimate(round(value), int(error) + 1)
