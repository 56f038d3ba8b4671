"""The address space as ksmd sees it: one small protocol, and nothing else.

ksmd is an algorithm. It never opens a file or a socket: whatever it does to a process it does through an
`AddressSpace`, of which there are two, `samepage.memory.simulated` (pages in an array; deterministic; what
the tests of the algorithm run on) and `samepage.memory.agent` (the far end of a socket to a real process).

Pages are named by their *virtual page number* (`vpn`, address divided by `PAGE_SIZE`) throughout.
"""

from __future__ import annotations

import errno
import math
import mmap
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Protocol

import numpy as np
import numpy.typing as npt

from samepage.process.merge_domain import MergeDomain

PAGE_SIZE = mmap.PAGESIZE
"""Bytes a page."""

AREAS_CHANGED = 0
"""`ScanResult.areas_seq` when the areas changed during the scan: of no list of areas is it the `seq`."""

VPN_END = 1 << 52
"""No address space of 64 bits has more pages of 4 KiB."""

USER_END = 1 << 44
"""No process has a page from here on: with five levels of page tables, user addresses end at 2^56."""

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]


class RunKind(IntEnum):
    """What `AddressSpace.scan` says of a run of pages."""

    HASHED = 0
    """Written since the last look (or never looked at): a checksum a page follows."""
    BROKEN = 1
    """Was merged when last looked at; now has a private copy of its own (copy-on-write was broken)."""
    GONE = 2
    """Was merged when last looked at; now discarded, unmapped or moved away. What is there instead, if anything, is in
    runs of its own."""
    FOUND = 3
    """Is merged already, with what `ino` and `offset` say: came by fork, by mremap, or from before a service went."""


class ScanFlag(IntFlag):
    """What a scan is to do beyond the usual."""

    NONE = 0
    ALL = 1
    """Hash every page, not only those written since the last look."""
    NODES = 2
    """Make the NUMA node of a page part of its checksum, so that pages of different nodes have different ones. A page
    of zeros keeps its checksum, since the zero page has no node."""
    STILL = 4
    """Assume that merged pages still are, and do not look for broken ones. What others wrote into the process need not
    be found either, so that a process without a page fault since the last look need not be looked at."""
    NAMED = 8
    """Look only at large allocations, and at memory that the program itself named (MADV_MERGEABLE)."""


class PageStatus(IntEnum):
    """What became of one page that was to be donated or merged."""

    DONE = 0
    DIFFERENT = 1
    """The bytes are not those of the segment's page: the checksum lied, or the page was just written."""
    BUSY = 2
    """Pinned for DMA, or still shared with a fork: `UFFDIO_MOVE` says EBUSY."""
    GONE = 3
    """Not present any more, or not in a mergeable area."""
    NOMEM = 4
    """Refused because there was too little headroom (see `break_ksm`)."""
    NOMAP = 5
    """`vm.max_map_count` is spent."""
    REFUSED = 6
    """Cannot be merged where it is: locked, not writable, or no safe way to swap it in this process."""


DONE, LAST_STATUS = np.uint8(PageStatus.DONE), np.uint8(max(PageStatus))
"""To compare arrays with, for every answer: with the members themselves numpy takes five times as long."""


RUN = np.dtype([("vpn", "<u8"), ("npages", "<u4"), ("kind", "<u4"), ("ino", "<u8"), ("offset", "<u8")])
"""One run of a `ScanResult`. `ino` and `offset` (in pages) are used by `RunKind.FOUND` alone. 32 bytes."""

EXTENT = np.dtype([("vpn", "<u8"), ("npages", "<u8"), ("offset", "<u8")])
"""A run of pages to merge with the pages of a segment that start at `offset` (in pages). 24 bytes."""

ZERO_PAGE = (1 << 64) - 1
"""The `offset` of an extent whose pages are to become the kernel's zero page; needs no segment."""

AREA = np.dtype([("vpn", "<u8"), ("npages", "<u8")])
"""A mergeable area: what `VM_MERGEABLE` marks in the kernel. 16 bytes."""


@dataclass(slots=True)
class Areas:
    """What is mergeable in an address space: `ranges` is ascending, disjoint, of dtype `AREA`; `seq` changes whenever
    anything here does. `merge_any`: all it maps from now on is, too (`PR_SET_MEMORY_MERGE`)."""

    seq: int
    ranges: npt.NDArray[np.void]
    merge_any: bool = False


STALLS_US = (30, 100, 300, 1000, 3000, 10_000, 100_000)
"""Held-up threads are counted by for how long at most, in microseconds; the last count is of longer waits."""


@dataclass(slots=True, frozen=True)
class Stalls:
    """How often threads of a process were held up for ksmd, by `STALLS_US`, and for how long in total. All of this is
    an upper bound: a thread counts for as long as the page that it wanted was out of its place."""

    counts: tuple[int, ...] = (0,) * (len(STALLS_US) + 1)
    ns: int = 0

    def __add__(self, more: Stalls) -> Stalls:
        return Stalls(tuple(a + b for a, b in zip(self.counts, more.counts, strict=True)), self.ns + more.ns)

    def __sub__(self, less: Stalls) -> Stalls:
        return Stalls(tuple(a - b for a, b in zip(self.counts, less.counts, strict=True)), self.ns - less.ns)


NO_STALLS = Stalls()


@dataclass(slots=True)
class ScanResult:
    """One step of a scan.

    `runs` is of dtype `RUN`. Those of GONE pages are ascending by `vpn` and disjoint, and so are all others, which say
    what is there instead. `checksums` holds, in the same order, one checksum for every page of every HASHED run.
    `next_vpn` is where the next step goes on, 0 at the end of the last area. `areas_seq` changes whenever the list of
    areas does, or is AREAS_CHANGED; `cpu_ns` is CPU time spent in the process itself. `forked` seconds ago it forked
    last. `stalls` are those since the last step.
    """

    runs: npt.NDArray[np.void]
    checksums: U64
    next_vpn: int
    areas_seq: int
    cpu_ns: int
    forked: float = math.inf
    stalls: Stalls = NO_STALLS


@dataclass(slots=True)
class BreakResult:
    """How far a `break_ksm` came.

    `errno` is 0, ENOMEM (headroom was less than a batch and the reserve: nothing was faulted for it), EINTR
    (cancelled between two batches) or EFAULT (the area went away, or hardware poison: the kernel's SIGBUS).
    `pages_unmerged` were given private copies; `pages_remaining` in the range are still merged.
    `bytes_needed` is what private copies of all these take (everywhere in samepage it is that of the pages in question
    that are merged), `bytes_available` what there is for them without touching the reserve. `unseen`: nothing is
    available
    because something that may limit the process could not be read.
    """

    errno: int = 0
    pages_unmerged: int = 0
    pages_remaining: int = 0
    bytes_needed: int = 0
    bytes_available: int = 0
    unseen: bool = False


class Segment(Protocol):
    """A sealed copy of some pages that any process of the domain may map: immutable for ever."""

    @property
    def ino(self) -> int:
        """What FOUND runs call this segment (the inode of the memfd)."""
        ...

    @property
    def npages(self) -> int: ...

    def close(self) -> None:
        """Let go of it. Processes that map it keep it; it can be given to nobody else any more."""
        ...


Claims = list[tuple[Segment | None, npt.NDArray[np.int64]]]
"""Segments (None: one still to be made), and pages of one process that are to be merged with each, ascending."""


@dataclass(slots=True)
class Donation:
    """Outcome of `AddressSpace.donate`.

    `status` has one `PageStatus` for every page asked for, in order. `segment` holds copies of exactly the
    DONE ones, in order and with no holes, and is None when there are none.
    """

    segment: Segment | None
    status: U8
    cpu_ns: int = 0

    def close(self) -> None:
        """Drop a donation that nobody wants."""
        if self.segment is not None:
            self.segment.close()


@dataclass(slots=True)
class MergeResult:
    """Outcome of `AddressSpace.merge`: one `PageStatus` for every page of every extent, in order."""

    status: U8
    cpu_ns: int = 0


@dataclass(slots=True)
class RestoreResult:
    """Outcome of `AddressSpace.restore`: how many pages are ordinary memory again, and how many are not, because
    somebody holds them or there was no memory to spare."""

    pages_restored: int = 0
    pages_left: int = 0
    cpu_ns: int = 0


@dataclass(slots=True, frozen=True)
class Stirring:
    """By what a process shows that it works, by proc_pid_stat(5): page faults so far, pages that it has, seconds of CPU
    so far."""

    faults: int
    pages: int
    cpu_seconds: float


class AddressSpaceGone(OSError):
    """The process is gone (`ended`), hung past the timeout, or talked nonsense. Its mm_slot has to be dropped."""

    def __init__(self, why: str, ended: bool = False) -> None:
        super().__init__(errno.ESRCH, why)
        self.ended = ended


class AddressSpaceSilent(AddressSpaceGone):
    """The process cannot answer now, because it is stopped, traced or frozen (`state`), but it will when it goes on.
    Until `AddressSpace.catch_up` says that it does, every request raises this again."""

    def __init__(self, pid: int, state: str) -> None:
        super().__init__(f"process {pid} does not answer: it is {state}")
        self.errno = errno.ETIMEDOUT
        self.state = state


class AddressSpace(Protocol):
    """One process. Every method may raise `AddressSpaceGone`; none raises anything else for what a peer does, and
    whatever one returns could be true (`samepage.memory.check`)."""

    @property
    def pid(self) -> int: ...

    @property
    def domain(self) -> MergeDomain:
        """Pages are never compared across merge domains."""
        ...

    @property
    def owner(self) -> MergeDomain:
        """Whose process it is: the merge domain it would be in without a policy."""
        ...

    @property
    def zero_checksum(self) -> int:
        """This process's checksum of a page of zeros."""
        ...

    def stirring(self) -> Stirring | None:
        """How it moves, if memory that nobody named is merged. None: only what was named is, or it is not known. The
        process itself is not asked."""
        ...

    def is_there(self) -> bool:
        """Whether the process has not ended or executed another program, though it may not answer. It is not asked."""
        ...

    def halted(self) -> str:
        """Why it cannot answer at this moment (`samepage.process.halt`); "" if it can. The process is not asked."""
        ...

    def starved(self) -> float:
        """Seconds since the last call of this for which it would have answered and had no CPU. It is not asked."""
        ...

    def catch_up(self) -> tuple[str, list[ScanResult]]:
        """After `AddressSpaceSilent`: why it is silent still ("": it is not), and the scans that it has answered since.
        AddressSpaceGone: it was silent in the middle of what can be told only by asking it for everything anew."""
        ...

    def interruptible(self, cancelled: Callable[[], bool]) -> AbstractContextManager[None]:
        """While this is in use, no request waits for long after `cancelled()` says so. A process that leaves one
        without an answer is then gone."""
        ...

    def verify(self) -> None:
        """Raise AddressSpaceGone if this is no longer the process that joined, or no longer that user's. The process
        itself is not asked."""
        ...

    def misplaced(self) -> str:
        """Why it does not belong in its merge domain any more; "" if it does. The process itself is not asked. Raises
        OSError if it has ended."""
        ...

    def pages_max(self) -> int:
        """How many pages with something in them it had, at most. The process itself is not asked."""
        ...

    def areas(self) -> Areas:
        """What is mergeable now."""
        ...

    def scan(self, vpn: int, budget: int, flags: ScanFlag = ScanFlag.NONE, end: int = VPN_END) -> ScanResult:
        """Look at pages from `vpn` on (0: from the start) and before `end`, until `budget` pages were hashed, an
        implementation's step is full, or the areas end. Only pages written since the previous look are hashed."""
        ...

    def donate(self, runs: npt.NDArray[np.void]) -> Donation:
        """Copy runs of pages (dtype `AREA`) into a new sealed segment. The process keeps its own pages: it merges
        with the segment like anybody else, by `merge`. A page shared with a fork is BUSY: a copy would save nothing."""
        ...

    def prove_ahead(self, claims: Claims) -> None:
        """It is about to be asked to merge with these. What it has to prove before it is given them, it proves now for
        all of them."""
        ...

    def merge(self, segment: Segment | None, extents: npt.NDArray[np.void]) -> MergeResult:
        """Compare each page of `extents` (dtype `EXTENT`) with the segment's, byte for byte, and where equal
        map the segment's page over it, copy-on-write, atomically for the process's other threads.
        `segment` may be None when every extent is `ZERO_PAGE`."""
        ...

    def break_ksm(self, vpn: int, npages: int) -> BreakResult:
        """Give every merged page of the range a private copy again, batch by batch; stops at the first error."""
        ...

    def restore(self, runs: npt.NDArray[np.void]) -> RestoreResult:
        """Make pages in runs (dtype `AREA`) that were merged and then written, which the kernel does not let be merged
        where they are, memory like any other; the next scan hashes them. Pages that anybody else holds stay as they
        are (pinned for I/O, shared with a fork), and so do some around them."""
        ...

    def present(self, vpn: int, npages: int) -> npt.NDArray[np.void]:
        """Which pages of a range hold something (runs of dtype `AREA`): are neither absent nor the kernel's zero page.
        The process itself is not asked, and no page counts as looked at. Before Linux 6.7 pages that are shared by a
        fork are left out."""
        ...

    def map_count(self) -> tuple[int, int]:
        """`(used, limit)`: mappings in the process now, and how many samepage may let it grow to."""
        ...

    def headroom(self) -> tuple[str, int]:
        """`(group, bytes)`: its memory cgroup ("" if not known), and what could still be allocated there before anybody
        would have to be killed."""
        ...
