"""What processes are asked to do for a slice of matched pages: donate copies, and merge with them or with nodes.

The steps depend on each other. A copy must be made before any process can merge with it. Its donor merges last, and
only if another process has merged with it by then: a copy that no other page equals saves nothing. No process waits for
more than that: while one merges with what another has just donated, the other donates more.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from samepage.arrays import Bools, Ints, expand, run_starts
from samepage.ksmd.domain import Domain
from samepage.ksmd.mm_slot import MmSlot, Structured
from samepage.ksmd.patience import A_MOMENT
from samepage.ksmd.stable import SEGMENT_PAGES, StableSegment
from samepage.memory import AREA, DONE, EXTENT, U8, U32, U64, Claims, PageStatus, Segment

HUGE_PAGE = 512
"""Pages of a huge page. A process swaps it as a whole if it is asked for all of it at once."""

IN_HAND = 2
"""How many requests a process has at the same time, at most. It works on one after the other, but finds the next at
once, instead of waiting until its last answer has been taken in."""

AHEAD = 2
"""How many copies (8 MiB each) a process makes ahead of the others trying them."""

MUCH_WORK = 1.0
"""Seconds that a process may take for a whole copy, or for merging with one, before it counts as waiting."""

UNASKED = 255
"""The status of a page that was not asked for, because there is no copy to merge it with."""

COPY = np.uint64(1 << 32)
"""Target `COPY + ref`: a copy of that page, still to be made. A smaller target is a stable node."""

Each = Callable[[Iterable[MmSlot], Callable[[MmSlot], Any]], dict[MmSlot, Any]]
"""Does something with several processes at the same time (`MergeWork.each`)."""


@dataclass(slots=True)
class _Task:
    """One request to a process; `drop` is called instead if the process is gone or silent, or time is up."""

    do: Callable[[], None]
    drop: Callable[[], None]


@dataclass(slots=True)
class _Queue:
    """The requests still to be sent to one process."""

    first: _Task | None = None
    merges: deque[_Task] = field(default_factory=deque)
    donations: deque[_Task] = field(default_factory=deque)
    asked: int = 0
    """How many requests it has at this moment."""
    ahead: int = 0
    """Copies that it was told to make, and that not all processes that are to merge with them have tried."""

    def next(self) -> _Task | None:
        """Copies first, since others wait for them; but not many ahead, since they take memory."""
        if self.first:
            first, self.first = self.first, None
            return first
        if self.donations and self.ahead < AHEAD:
            self.ahead += 1
            return self.donations.popleft()
        return self.merges.popleft() if self.merges else None


class _Queues:
    """The requests still to be sent to each process. No thread rests while there is a process to ask."""

    def __init__(self, each: Each, is_over: Callable[[], bool]) -> None:
        self._each = each
        self._is_over = is_over
        self._changed = threading.Condition()
        self._queues: dict[MmSlot, _Queue] = {}

    def first(self, slot: MmSlot, task: _Task) -> None:
        """Have a process do this before all else. Call it before `run`."""
        self._queues.setdefault(slot, _Queue()).first = task

    def donate(self, slot: MmSlot, task: _Task) -> None:
        """Queue a donation. Call it before `run`."""
        self._queues.setdefault(slot, _Queue()).donations.append(task)

    def merge(self, slot: MmSlot, task: _Task, first: bool = False) -> None:
        """Queue a merge, from any thread. `first`: ahead of all others, since its pages are in the CPU's cache."""
        with self._changed:
            merges = self._queues.setdefault(slot, _Queue()).merges
            if first:
                merges.appendleft(task)
            else:
                merges.append(task)
            self._changed.notify_all()

    def tried(self, slot: MmSlot) -> None:
        """Note that all processes have tried a copy that this process made."""
        with self._changed:
            self._queues[slot].ahead -= 1
            self._changed.notify_all()

    def run(self) -> None:
        """Work until nothing is left to do."""
        while ready := [slot for slot, queue in self._queues.items() if queue.first or queue.merges or queue.donations]:
            for slot in ready:
                while slot.is_away and (task := self._queues[slot].next()):
                    task.drop()
            self._each(ready * IN_HAND, self._work)

    def _work(self, preferred: MmSlot) -> None:
        while taken := self._take(preferred):
            slot, task = taken
            done = False
            try:
                if not slot.is_away and not self._is_over():
                    task.do()
                    done = True
            except Exception as e:
                slot.lose(e)
            finally:
                if not done:
                    task.drop()
                with self._changed:
                    self._queues[slot].asked -= 1
                    self._changed.notify_all()

    def _take(self, preferred: MmSlot) -> tuple[MmSlot, _Task] | None:
        """The next task, of that process if it has one; None when there is none, and none can come."""
        with self._changed:
            while True:
                for slot in (preferred, *self._queues):
                    queue = self._queues[slot]
                    if queue.asked < IN_HAND and (task := queue.next()):
                        queue.asked += 1
                        return slot, task
                if not any(queue.asked for queue in self._queues.values()):
                    return None
                self._changed.wait()


@dataclass(slots=True, eq=False)
class _Copy:
    """A segment to be made of pages of `slot`: `vpns`, which are those `donors` of the exchange."""

    slot: MmSlot
    vpns: Ints
    donors: Ints
    own: Ints
    """Positions of these pages among the refs; -1 where one is not to be merged itself."""
    waiting: int = 0
    """Processes that have not tried to merge with it yet."""
    segment: Segment | None = None
    offset: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    """Where each page is in the segment; -1 where it is not."""
    used: Bools = field(default_factory=lambda: np.empty(0, np.bool_))


@dataclass(slots=True)
class _Share:
    """Pages of one process that are to be merged with one segment; `pages` are positions among the refs."""

    slot: MmSlot
    vpns: Ints
    pages: Ints
    place: Ints
    """Which page of the copy, or of the segment there is, each of them equals."""


class Exchange:
    """Lets processes make copies of `donors`, and merge `refs` with their `target`s; both ascend. Afterwards `status`
    has for each ref a `PageStatus` or `UNASKED`. For refs that were to be merged with a copy, `donation_of` and
    `node_of` say what became of the copy. `segments` are the new ones.
    """

    def __init__(self, domain: Domain, refs: U32, target: U64, donors: U32, passes: int) -> None:
        self._domain = domain
        self._passes = passes
        self._lock = threading.Lock()  # guards what copies know of those who merge with them
        self.status: U8 = np.full(len(refs), UNASKED, np.uint8)
        self.segments: list[StableSegment] = []
        self._donors = donors
        self._donation: U8 = np.full(len(donors), PageStatus.BUSY, np.uint8)  # of processes that cannot be asked
        self._node: Ints = np.full(len(donors), -1, np.int64)
        self._copies: list[_Copy] = []
        self._with_copies: list[list[_Share]] = []
        self._with_nodes: list[tuple[Segment | None, _Share]] = []
        self._plan(refs, target)

    def donation_of(self, at: Ints) -> U8:
        """What became of the donations that these refs were to be merged with: a `PageStatus`."""
        return self._donation[self._rank[at]]

    def node_of(self, at: Ints) -> Ints:
        """The nodes of the copies that these refs were to be merged with; -1: there is none."""
        return self._node[self._rank[at]]

    def new_nodes(self) -> Ints:
        """All of them."""
        return self._node[self._node >= 0]

    def counts(self) -> Ints:
        """How often each `PageStatus` was answered: of merges, and of donations that failed."""
        asked, failed = self.status != UNASKED, self._donation != PageStatus.DONE
        merges = np.bincount(self.status[asked], minlength=len(PageStatus))
        return merges + np.bincount(self._donation[failed], minlength=len(PageStatus))

    # -- the plan ---------------------------------------------------------------------------------------

    def _plan(self, refs: U32, target: U64) -> None:
        copied, donors = target >= COPY, self._donors
        self._rank: Ints = np.zeros(len(refs), np.int64)
        """For each ref that is to be merged with a copy, the position of its donor among the donors."""
        theirs = (target[copied] - COPY).astype(np.uint32)
        starts = run_starts(theirs)  # donors that follow one another do so among the donors, too
        lengths = np.diff(np.append(starts, len(theirs)))
        self._rank[copied] = expand(np.searchsorted(donors, theirs[starts]), lengths)
        donating = target == COPY + refs
        own = np.full(len(donors), -1, np.int64)
        own[self._rank[donating]] = np.flatnonzero(donating)
        copy_of, place = self._plan_copies(own)
        for slot, (at, vpns) in self._domain.by_memory(refs).items():
            with_copy = copied[at]
            others = with_copy & ~donating[at]
            self._plan_copies_of_others(slot, at[others], vpns[others], copy_of, place)
            self._plan_nodes(slot, at[~with_copy], vpns[~with_copy], target)

    def _plan_copies(self, own: Ints) -> tuple[Ints, Ints]:
        """Which copy each donor goes into, and where in it. `own` are the donors' positions among the refs."""
        copy_of, place = np.empty(len(self._donors), np.int64), np.empty(len(self._donors), np.int64)
        for slot, (at, vpns) in self._domain.by_memory(self._donors).items():
            for part in _cut(vpns):
                copy_of[at[part]] = len(self._copies)
                place[at[part]] = np.arange(part.stop - part.start)
                self._copies.append(_Copy(slot, vpns[part], at[part], own[at[part]]))
        self._with_copies = [[] for _ in self._copies]
        return copy_of, place

    def _plan_copies_of_others(self, slot: MmSlot, pages: Ints, vpns: Ints, copy_of: Ints, place: Ints) -> None:
        """Pages of one process that are to be merged with copies of other pages."""
        rank = self._rank[pages]
        their_place = place[rank]
        for number, these in _groups(copy_of[rank]):
            self._with_copies[number].append(_Share(slot, vpns[these], pages[these], their_place[these]))
            self._copies[number].waiting += 1

    def _plan_nodes(self, slot: MmSlot, pages: Ints, vpns: Ints, target: U64) -> None:
        """Pages of one process that are to be merged with nodes that are there."""
        stable = self._domain.stable
        nodes = target[pages].astype(np.int64)
        for number, these in _groups(stable.which(nodes)):
            segment = stable.segments[number]
            share = _Share(slot, vpns[these], pages[these], nodes[these] - segment.base)
            self._with_nodes.append((segment.handle, share))

    # -- the work, in any thread ------------------------------------------------------------------------

    def run(self, each: Each, is_over: Callable[[], bool] = lambda: False) -> None:
        """Do all of it, or as much as begins before `is_over`; the rest is treated as if its processes were silent."""
        queues = _Queues(each, is_over)
        for slot, claims in self._claims().items():
            queues.first(slot, self._proving(slot, claims))
        for segment, share in self._with_nodes:
            queues.merge(share.slot, self._joining(segment, share))
        for copy, shares in zip(self._copies, self._with_copies, strict=True):
            queues.donate(copy.slot, self._donating(queues, copy, shares))
        try:
            queues.run()
            for copy in self._copies:
                if copy.segment is not None:
                    done = copy.donors[copy.offset >= 0]
                    checksums = self._domain.checksum[self._donors[done]]
                    new = self._domain.stable.add(copy.segment, checksums, self._passes)
                    copy.segment = None  # not ours any more
                    self._node[done] = new.base + np.arange(len(done))
                    self.segments.append(new)
        finally:
            for copy in self._copies:
                if copy.segment is not None:
                    copy.segment.close()

    def _claims(self) -> dict[MmSlot, Claims]:
        """The segments that each process is to merge with, and did not make: those that there are, and (None) those to
        come; and with which of its pages."""
        claims: dict[MmSlot, Claims] = {}
        for segment, share in self._with_nodes:
            claims.setdefault(share.slot, []).append((segment, share.vpns))
        for share in itertools.chain.from_iterable(self._with_copies):
            if len(share.pages):
                claims.setdefault(share.slot, []).append((None, share.vpns))
        return {slot: theirs for slot, theirs in claims.items() if len(theirs) > 1}

    @staticmethod
    def _proving(slot: MmSlot, claims: Claims) -> _Task:
        def do() -> None:
            with slot.waited_for():
                slot.space.prove_ahead(claims)

        return _Task(do, lambda: None)

    def _joining(self, segment: Segment | None, share: _Share) -> _Task:
        def drop() -> None:
            self.status[share.pages] = PageStatus.BUSY

        return _Task(lambda: self._merge(segment, share.slot, share.vpns, share.place, share.pages), drop)

    def _donating(self, queues: _Queues, copy: _Copy, shares: list[_Share]) -> _Task:
        def do() -> None:
            self._donate(copy)
            for share in shares:
                queues.merge(share.slot, self._sharing(queues, copy, share), first=True)
            if not shares:
                queues.tried(copy.slot)

        return _Task(do, lambda: queues.tried(copy.slot))  # nobody was told of it

    def _sharing(self, queues: _Queues, copy: _Copy, share: _Share) -> _Task:
        def tried() -> None:
            with self._lock:
                copy.used[share.place[self.status[share.pages] == DONE]] = True
                copy.waiting -= 1
                last = not copy.waiting
            if last:
                queues.merge(copy.slot, self._owning(copy), first=True)
                queues.tried(copy.slot)

        def do() -> None:
            offset = copy.offset[share.place]
            there = np.flatnonzero(offset >= 0)
            if len(there):
                self._merge(copy.segment, share.slot, share.vpns[there], offset[there], share.pages[there])
            tried()

        def drop() -> None:
            self.status[share.pages] = PageStatus.BUSY
            tried()

        return _Task(do, drop)

    def _owning(self, copy: _Copy) -> _Task:
        used = np.flatnonzero(copy.used & (copy.own >= 0))

        def do() -> None:
            if len(used):
                self._merge(copy.segment, copy.slot, copy.vpns[used], copy.offset[used], copy.own[used])

        return _Task(do, lambda: None)

    def _donate(self, copy: _Copy) -> None:
        starts = run_starts(copy.vpns)
        runs = np.empty(len(starts), AREA)
        runs["vpn"], runs["npages"] = copy.vpns[starts], np.diff(np.append(starts, len(copy.vpns)))
        with copy.slot.waited_for(_may_take(len(copy.vpns))):
            donation = copy.slot.space.donate(runs)
        with self._lock:
            copy.slot.cpu_ns += donation.cpu_ns
        done = donation.status == DONE
        copy.offset = np.where(done, np.cumsum(done) - 1, -1)
        copy.used = np.zeros(len(done), np.bool_)
        copy.segment = donation.segment
        self._donation[copy.donors] = donation.status

    def _merge(self, segment: Segment | None, slot: MmSlot, vpns: Ints, offset: Ints, pages: Ints) -> None:
        starts = run_starts(vpns, offset)
        extents = np.empty(len(starts), EXTENT)
        extents["vpn"], extents["offset"] = vpns[starts], offset[starts]
        extents["npages"] = np.diff(np.append(starts, len(vpns)))
        cpu_ns = merge(slot, segment, extents, pages, self.status)
        with self._lock:
            slot.cpu_ns += cpu_ns


def merge(slot: MmSlot, segment: Segment | None, extents: Structured, pages: Ints, status: U8) -> int:
    """Let a process merge, and put the status of each page at its position in `status`. Returns the CPU time it took,
    in ns. Raises AddressSpaceGone."""
    with slot.waited_for(_may_take(len(pages))):
        result = slot.space.merge(segment, extents)
    status[pages] = result.status
    return result.cpu_ns


def _may_take(npages: int) -> float:
    """How many seconds so many pages may take. There may be very many copies of a few pages each."""
    return min(MUCH_WORK, A_MOMENT + MUCH_WORK * npages / SEGMENT_PAGES)


def _cut(vpns: Ints) -> Iterator[slice]:
    """Parts of at most `SEGMENT_PAGES`. Where one would end within a huge page, it ends before that."""
    start = 0
    while start < len(vpns):
        end = min(start + SEGMENT_PAGES, len(vpns))
        if end < len(vpns):
            over = int(vpns[end]) % HUGE_PAGE
            if over < end - start and vpns[end - over] + over == vpns[end]:
                end -= over
        yield slice(start, end)
        start = end


def _groups(keys: Ints) -> Iterator[tuple[int, Ints]]:
    """Each key with the positions where it stands, ascending."""
    if not len(keys):
        return
    if keys[0] == keys[-1] and not np.any(keys != keys[0]):
        yield int(keys[0]), np.arange(len(keys))
        return
    order = np.argsort(keys, kind="stable")
    for these in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1):
        yield int(keys[these[0]]), these
