"""One process, as ksmd keeps it: its areas, which of their pages have refs, and what its pages are."""

from __future__ import annotations

import contextlib
import math
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from samepage.arrays import Ints
from samepage.ksmd.age import Ages
from samepage.ksmd.motion import REST_LEAST, Motion
from samepage.ksmd.patience import A_MOMENT, Patience
from samepage.ksmd.pieces import Pieces, Stretches
from samepage.ksmd.rmap import HAS_CHECKSUM, PageState
from samepage.memory import NO_STALLS, U32, AddressSpace, AddressSpaceGone, AddressSpaceSilent, ScanResult

if TYPE_CHECKING:
    from samepage.ksmd.domain import Domain

Structured = npt.NDArray[np.void]

NSTATES = len(PageState)
NO_CHECKSUM = [state for state in PageState if not HAS_CHECKSUM[state]]

PAGES_MORE = 4096
"""A process may report twice as many pages as it ever had, and this many more: it may not have reported yet what it
gave up."""

BREAK_FEW = 64
"""How many pages a process is asked to break at first; the slowest is never asked for more (256 KiB)."""

STILL_MAX = 8
"""The most passes in which broken pages of a process are not looked for."""


WHOLE = (0, 1 << 52)
"""All pages an address space can have: (vpn, npages)."""


class Scope(IntEnum):
    """What of a process a pass looks at (`motion`)."""

    NOTHING = 0
    NAMED = 1
    """Memory that was asked to be merged, and not only because all is."""
    ALL = 2


@dataclass(slots=True, frozen=True)
class Owed:
    """An unmerge of pages [vpn, vpn + npages); `leave_alone` as in `unmerge_pages`: False if it was `run` = 2."""

    vpn: int
    npages: int
    leave_alone: bool


@dataclass(slots=True)
class Wait:
    """`free`: how many seconds of the wait do not count. `took`: how long it was, once it is over."""

    free: float
    took: float = 0.0


class MmSlot:
    """The handle `Ksmd.enter` gives for a process (struct ksm_mm_slot).

    `pid`, `comm` and `swap` (how pages are swapped under its threads) are for show. The rest is ksmd's.
    """

    def __init__(self, space: AddressSpace, domain: Domain, number: int, comm: str, swap: str) -> None:
        self.space = space
        self.domain = domain
        self.number = number  # position in the list of slots: they are walked in this order
        self.pid = space.pid
        self.comm = comm
        self.swap = swap
        self.gone = False  # asked to leave, or its process is gone: forgotten at the next safe moment
        self.lost = ""  # why, if it was not asked for
        self.astray = False  # it was lost, and its process may still be there
        self.silent = ""  # why it does not answer (AddressSpaceSilent): asked nothing until it does
        self.unheard: list[ScanResult] = []  # scans that were not taken in before it fell silent
        self.aside: list[U32] = []  # its candidates, meanwhile
        self.owed: list[Owed] = []  # unmerges that did not reach it: done as soon as it answers
        self.areas_seq: int | None = None
        self.merge_any = False  # PR_SET_MEMORY_MERGE
        self.hash_all = False  # its checksums were made by other rules: until it was looked at to the end, all are
        self.areas = Stretches()
        self.pieces = Pieces()  # of pages in areas only
        self.ages = Ages()
        self.counts: Ints = np.zeros(NSTATES, np.int64)  # pages by PageState
        self.motion: Motion | None = None
        # What of it the pass looks at. It fills its memory, as far as is known before the first pass that it is in.
        self.scope = Scope.ALL if space.stirring() is None else Scope.NOTHING
        self._saw_all = False  # the last look at it was at all its memory
        self.looks = 0  # times all its areas were looked at, or those that were named
        self.passes = 0  # times all were
        self.stirred = False  # in this pass something of it was found changed
        self._still = 0  # passes for which its merged pages are taken to be so still
        self._quiet = 0  # looks at them in a row that found nothing
        self._merged = 0  # how many there were after the last pass
        self.cpu_ns = 0
        self.stalls = NO_STALLS
        self.zero_checksum = space.zero_checksum & ((1 << 64) - 1)
        self.group = ""  # its memory cgroup, when last asked
        self.pending_breaks: list[tuple[int, int]] = []  # (vpn, npages) whose unmerge was asked for and failed
        self.pending_attempts = 0
        self.pending_due = 0
        self.patience = Patience(most=10.0, regain=0.02)
        self.idle_looks = 0  # looks of this pass that hardly got on
        self.pages_max = 0  # pages with checksums that it can have, as far as was asked
        self.verified = -math.inf  # when it was last seen to be who it was
        self.placed = -math.inf  # when it was last seen where it belongs, or not
        self.leaving = ""  # why it belongs in another merge domain: nothing is merged, and all of it is unmerged
        self.break_pages = BREAK_FEW  # that it is asked to break next
        self.faults = 0  # breaks of an unmerge that ended with EFAULT
        self.islands_due = 0  # the pass after which broken pages are asked about again
        self.islands_attempts = 0  # in a row that were in vain

    def lose(self, why: Exception) -> None:
        """Mark it as gone, or as one that cannot be served any more, or not now."""
        if isinstance(why, AddressSpaceSilent):
            self.silent = why.state
        elif not self.gone:
            self.gone, self.lost = True, in_words(why)
            self.astray = not (isinstance(why, AddressSpaceGone) and why.ended)

    @property
    def is_away(self) -> bool:
        """Whether it is useless to ask it anything."""
        return self.gone or bool(self.silent or self.leaving)

    @property
    def is_left_out(self) -> bool:
        """Whether the pass leaves memory of it out that nobody named, for it is filled."""
        return self.scope is not Scope.ALL

    def rests_in(self, now: float) -> float:
        """How many seconds until it may have come to rest, if it was left out of all passes; infinite: it was not."""
        if self.passes or not self.is_left_out or self.motion is None:
            return math.inf
        return max(REST_LEAST / 2, self.motion.rests_at - now)

    @property
    def is_known(self) -> bool:
        """Whether what the pass looks at was all looked at before."""
        return self.passes > 0 or (self.is_left_out and self.looks > 0)

    @property
    def is_put_off(self) -> bool:
        """Whether it is silent or leaving, or it or its like has kept ksmd waiting for too long."""
        return bool(self.silent or self.leaving) or self.patience.is_spent or self.domain.patience.is_spent

    @contextlib.contextmanager
    def waited_for(self, free: float = A_MOMENT) -> Iterator[Wait]:
        """While this is in use, ksmd waits for an answer of this process, or takes it in. More than `free` seconds of
        that count; the block may change `free`. Raises AddressSpaceGone without asking if that was so too often."""
        if self.patience.is_at_an_end:
            raise AddressSpaceGone("it keeps everybody waiting")
        began, wait = time.monotonic(), Wait(free)
        try:
            yield wait
        finally:
            wait.took = time.monotonic() - began
            self.kept_waiting(wait.took - wait.free)

    def kept_waiting(self, seconds: float) -> None:
        """Take it off the accounts, if it is any time at all. That the owner's processes had no CPU is not their fault.
        (Others may see to it that they have none.)"""
        if seconds > 0 and not self.domain.is_foreign:
            seconds -= self.space.starved()
        if seconds > 0:
            self.patience.spend(seconds)
            self.domain.patience.spend(seconds)

    def expect(self, npages: int) -> None:
        """Note that it claims so many pages as its own. Raises AddressSpaceGone if it cannot have as many."""
        if npages > self.pages_max:
            self.pages_max = 2 * self.space.pages_max() + PAGES_MORE
            if npages > self.pages_max:
                raise AddressSpaceGone("it tells of more pages than it has")

    def looked_at(self) -> None:
        """All its areas were looked at once more, or those that were named. While nothing happens, broken pages are
        looked for ever more rarely, since that takes thirty times as long as to see that anonymous memory was not
        written (so does smart_scan of the kernel with what never changes, see skip_age() in mm/ksm.c)."""
        if self.stirred or self.merged != self._merged:
            self._still = self._quiet = 0
        elif self._still:
            self._still -= 1
        else:
            self._still = min(1 << self._quiet, STILL_MAX)
            self._quiet += 1
        self._saw_all = not self.is_left_out
        self.looks += 1
        self.passes += self._saw_all
        self.idle_looks = 0
        self.stirred = False
        self.hash_all &= self.is_left_out or self.ages.skipping
        self.ages.end_pass(self.is_left_out)
        self._merged = self.merged

    def may_have_islands(self, passes: int) -> bool:
        """Whether to look for broken pages that can be restored."""
        return passes >= self.islands_due and bool(self.counts[PageState.BROKEN])

    def islands_in_vain(self, passes: int, longest: int) -> None:
        """Note that there were no islands, or that they were held: look later, unless more pages break."""
        self.islands_due = passes + min(1 << min(self.islands_attempts, 16), longest)
        self.islands_attempts += 1

    @property
    def is_still(self) -> bool:
        """Whether its merged pages need not be looked at in this pass."""
        return self._still > 0 and self.merged == self._merged and (self._saw_all or self.is_left_out)

    @property
    def npages(self) -> int:
        """Pages of all its areas."""
        return self.areas.npages

    @property
    def merged(self) -> int:
        """Pages merged with a segment or the zero page."""
        return merged_of(self.counts.tolist())  # asked of all in every pass: numpy takes ten times as long

    @property
    def unmerged(self) -> int:
        """How many pages are known and not merged: what it reports of them takes the service's memory."""
        return self.with_checksum + int(self.counts[PageState.BROKEN])

    @property
    def with_checksum(self) -> int:
        """Pages whose checksum is known."""
        counts = self.counts.tolist()
        return int(sum(counts) - sum([counts[state] for state in NO_CHECKSUM]))

    @property
    def known(self) -> int:
        """Pages of which anything is known."""
        return int(self.counts[PageState.UNTOUCHED + 1 :].sum())

    @property
    def rmap_items(self) -> int:
        """Pages that are known. As in the kernel, not those that are the zero page by now, nor any after `run` = 2."""
        return rmap_items_of(self.counts.tolist())


def merged_of(counts: list[int]) -> int:
    """Of pages by `PageState`: see `MmSlot.merged`."""
    return counts[PageState.MERGED] + counts[PageState.INHERITED] + counts[PageState.ZERO]


def rmap_items_of(counts: list[int]) -> int:
    """See `MmSlot.rmap_items`."""
    return sum(counts) - counts[PageState.UNTOUCHED] - counts[PageState.KNOWN] - counts[PageState.ZERO]


def in_no_tree_of(counts: list[int]) -> int:
    """Pages that are known and stand in neither tree, for whatever reason: what `pages_volatile` counts."""
    in_trees = counts[PageState.MERGED] + counts[PageState.INHERITED] + counts[PageState.UNSHARED]
    return rmap_items_of(counts) - in_trees


def in_words(why: Exception) -> str:
    """An error in words. AddressSpaceGone says why; any other exception is a defect of ksmd's."""
    if isinstance(why, AddressSpaceGone):
        return why.strerror or str(why)
    frames = traceback.extract_tb(why.__traceback__)
    at = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"a mistake of ksmd's own: {why!r}{at}"
