"""Pages that matched but could not be merged. Each is tried again after twice as many passes as the last time."""

from __future__ import annotations

import numpy as np

from samepage.ksmd.rmap import sorted_refs
from samepage.memory import U8, U32

LONGEST = 6
"""The wait grows to two to this power: 64 passes."""


COLLIDED_LONGEST = 10
"""The same where pages of equal checksum compared different: 1,024 passes."""


class Deferred:
    """A queue of refs by the pass in which they are due. An entry may be stale: the page's state decides."""

    def __init__(self) -> None:
        self._queue: list[tuple[int, int, U32]] = []  # (due, attempts so far, refs)
        self._released: U32 = np.empty(0, np.uint32)  # those let go last, ascending, and how often they were tried
        self._attempts: U8 = np.empty(0, np.uint8)

    def nbytes(self) -> int:
        """Bytes of memory this takes."""
        return sum(refs.nbytes for _, _, refs in self._queue) + self._released.nbytes + self._attempts.nbytes

    def defer(self, refs: U32, passes: int, longest: int = LONGEST) -> None:
        """Put refs aside. `passes` is the number of the current pass; two to the power `longest` is the longest
        wait."""
        if not len(refs):
            return
        attempts = np.zeros(len(refs), np.uint8)
        if len(self._released):
            at = np.minimum(np.searchsorted(self._released, refs), len(self._released) - 1)
            again = self._released[at] == refs
            attempts[again] = self._attempts[at[again]]
        for attempt in np.unique(attempts):
            again_in = 1 << min(int(attempt), longest)
            self._queue.append((passes + again_in, int(attempt) + 1, refs[attempts == attempt]))

    def due(self, passes: int) -> list[U32]:
        """Return the refs that are due by now."""
        now = [entry for entry in self._queue if entry[0] <= passes]
        if not now:
            self._released, self._attempts = self._released[:0], self._attempts[:0]
            return []
        self._queue = [entry for entry in self._queue if entry[0] > passes]
        self._released = sorted_refs([refs for _, _, refs in now])
        self._attempts = np.zeros(len(self._released), np.uint8)
        for _, attempts, refs in sorted(now, key=lambda entry: entry[1]):
            self._attempts[np.searchsorted(self._released, refs)] = min(attempts, 255)
        return [self._released]
