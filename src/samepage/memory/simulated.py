"""Address spaces made of dictionaries: deterministic, with a memory limit, and as faulty as a test wants them.

The content of a page is a number, 0 for zeros; its checksum is that number scrambled, cut to a few bits where
collisions are wanted. A `SimulatedMachine` has the memory and counts it, in two ways: what is in use, and what would
be if nobody had ever merged anything. The difference is the truth that `bytes_saved` is checked against.

The *application's* side is `write`, `discard`, `fork`, `map_area`, `unmap`, `mremap`, `read` and `exit`. They may be
called between the calls of ksmd, and within them: from `script`, which is called with the name of an operation and
a vpn just before each page it comes to, and can also make the operation fail.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from samepage.memory import (
    AREA,
    PAGE_SIZE,
    RUN,
    U64,
    VPN_END,
    ZERO_PAGE,
    AddressSpaceGone,
    AddressSpaceSilent,
    Areas,
    BreakResult,
    Donation,
    MergeResult,
    PageStatus,
    RestoreResult,
    RunKind,
    ScanFlag,
    ScanResult,
    Segment,
)

Script = Callable[[str, int], int | None]
"""`(operation, vpn)`, where the operation is "scan", "donate", "merge", "break" or "restore"; called before each page.

It may change the address space, or raise AddressSpaceGone. What it returns is the page's fate: a `PageStatus` for
"donate" and "merge", an errno for "break" (EAGAIN: the fault backs out, and is taken again), anything for "restore"
(somebody holds the page); None for no fault.
"""

MASK = (1 << 64) - 1


class OutOfMemory(Exception):
    """The application wrote more than the machine has: where a real one would wake the OOM killer."""


class _Frame:
    """Anonymous memory: one page, and how many address spaces have it (more than one after fork)."""

    __slots__ = ("content", "maps")

    def __init__(self, content: int) -> None:
        self.content = content
        self.maps = 1


class SimulatedSegment:
    """A sealed copy of pages. It takes memory as long as anybody maps it or it was not closed."""

    def __init__(self, machine: SimulatedMachine, ino: int, content: list[int]) -> None:
        self._machine = machine
        self.ino = ino
        self.content = tuple(content)
        self.maps = 0
        self.is_open = True

    @property
    def npages(self) -> int:
        """Pages in it."""
        return len(self.content)

    def close(self) -> None:
        """Let go of the descriptor."""
        self.is_open = False
        self._machine.segment_used(self)


@dataclass
class SimulatedMachine:
    """Memory, in pages. `limit` is what there is; donating and breaking leave `reserve` of it untouched."""

    limit: int = 1 << 40
    reserve: int = 0
    used: int = 0
    unmerged: int = 0
    """What would be in use if nothing had ever been merged."""
    segments: dict[int, SimulatedSegment] = field(default_factory=dict)
    next_ino: int = 1
    name: str = "/"

    @property
    def headroom(self) -> int:
        """Pages that donating or breaking may take."""
        return max(0, self.limit - self.used - self.reserve)

    @property
    def saved(self) -> int:
        """Pages that merging really saves now."""
        return self.unmerged - self.used

    def take(self) -> None:
        """One page more in use."""
        if self.used >= self.limit:
            raise OutOfMemory
        self.used += 1

    def new_segment(self, content: list[int]) -> SimulatedSegment:
        """A sealed memfd."""
        segment = SimulatedSegment(self, self.next_ino, content)
        self.next_ino += 1
        self.used += len(content)
        self.segments[segment.ino] = segment
        return segment

    def segment_used(self, segment: SimulatedSegment) -> None:
        """Free a segment if nobody has it any more."""
        if not segment.is_open and not segment.maps and segment.ino in self.segments:
            del self.segments[segment.ino]
            self.used -= segment.npages


@dataclass(slots=True)
class _Page:
    """A present page. `shadow` is the frame it would have if nothing had ever been merged."""

    shadow: _Frame
    frame: _Frame | None
    segment: SimulatedSegment | None = None
    offset: int = 0
    written: bool = True  # since it was looked at
    by_application: bool = False  # its copy-on-write was broken by a write

    @property
    def merged(self) -> bool:
        return self.frame is None

    @property
    def content(self) -> int:
        if self.frame is not None:
            return self.frame.content
        return self.segment.content[self.offset] if self.segment else 0


class SimulatedAddressSpace:
    """One process.

    `tracking`: the kernel tells which pages were written; otherwise every scan hashes all. `rehash_broken`: pages
    whose copy-on-write the application broke are hashed and can be merged again (as when pages are swapped by
    write-protecting them; not so when they are moved). `step`: most pages one scan hashes. `hash_bits`: of checksums.
    `map_limit`: how many mappings it may have. `nodes`: NUMA nodes, on which its pages lie in turn.
    """

    def __init__(
        self,
        machine: SimulatedMachine,
        pid: int,
        *,
        domain: int = 0,
        tracking: bool = True,
        rehash_broken: bool = True,
        step: int = 1 << 30,
        hash_bits: int = 64,
        map_limit: int = 1 << 30,
        nodes: int = 1,
    ) -> None:
        self.machine = machine
        self.pid = pid
        self.domain = domain
        self.tracking = tracking
        self.rehash_broken = rehash_broken
        self.step = step
        self.hash_bits = hash_bits
        self.map_limit = map_limit
        self.nodes = nodes
        self.script: Script | None = None
        self.forked = math.inf  # so many seconds ago, as it says itself
        self.alive = True
        self.halt = ""  # what keeps it from answering
        self.calls: list[str] = []
        self.pages_hashed = 0
        self.faults = 0
        self._areas: list[tuple[int, int]] = []  # (vpn, npages), ascending, disjoint
        self._areas_seq = 0
        self._pages: dict[int, _Page] = {}
        self._seen_merged: set[int] = set()  # pages that were merged when last looked at
        self.pinned: set[int] = set()  # pages that somebody holds, for I/O

    # -- the application --------------------------------------------------------------------------------

    def map_area(self, vpn: int, npages: int) -> None:
        """A new mergeable area."""
        self._areas = sorted([*self._areas, (vpn, npages)])
        self._areas_seq += 1

    def unmap(self, vpn: int, npages: int) -> None:
        """The range is no more. If it is mapped again before the next scan, its merged pages are reported GONE."""
        self.discard(vpn, npages)
        self._cut_areas(vpn, npages)

    def mremap(self, vpn: int, npages: int, to: int) -> None:
        """Move a range of pages elsewhere; there they are new to the agent."""
        moved = {at: self._pages.pop(at) for at in self._in(self._pages, vpn, npages)}
        self._cut_areas(vpn, npages)
        self.map_area(to, npages)
        for at, page in moved.items():
            page.written = True
            if page.by_application and not self.rehash_broken:
                self._seen_merged.add(at - vpn + to)  # to be told of
            self._pages[at - vpn + to] = page

    def _cut_areas(self, vpn: int, npages: int) -> None:
        left = []
        for start, n in self._areas:
            for lo, hi in ((start, min(start + n, vpn)), (max(start, vpn + npages), start + n)):
                if lo < hi:
                    left.append((lo, hi - lo))
        self._areas = left
        self._areas_seq += 1

    @staticmethod
    def _in(pages: dict[int, _Page] | set[int], vpn: int, npages: int) -> list[int]:
        return sorted(at for at in pages if vpn <= at < vpn + npages)

    def write(self, vpn: int, *contents: int) -> None:
        """Write pages from `vpn` on; copy-on-write is the kernel's."""
        for at, content in enumerate(contents, vpn):
            self._write(at, content)

    def _write(self, vpn: int, content: int) -> None:
        page = self._pages.get(vpn)
        if page is None:
            self.machine.take()
            self.machine.unmerged += 1
            self._pages[vpn] = _Page(_Frame(content), _Frame(content))
            return
        self._unshare_shadow(page)
        if page.merged:
            self._give_copy(page)
            page.by_application = True
        elif page.frame is not None and page.frame.maps > 1:
            self.machine.take()
            page.frame.maps -= 1
            page.frame = _Frame(content)
        assert page.frame is not None
        page.frame.content = page.shadow.content = content
        page.written = True

    def _unshare_shadow(self, page: _Page) -> None:
        if page.shadow.maps > 1:
            page.shadow.maps -= 1
            page.shadow = _Frame(page.content)
            self.machine.unmerged += 1

    def _give_copy(self, page: _Page) -> None:
        self.machine.take()
        content = page.content
        self._leave_segment(page)
        page.frame = _Frame(content)

    def _leave_segment(self, page: _Page) -> None:
        segment, page.segment = page.segment, None
        if segment is not None:
            segment.maps -= 1
            self.machine.segment_used(segment)

    def read(self, vpn: int) -> int:
        """What the application finds there."""
        page = self._pages.get(vpn)
        return page.content if page else 0

    def discard(self, vpn: int, npages: int = 1) -> None:
        """MADV_DONTNEED: zeros from now on."""
        for at in self._in(self._pages, vpn, npages):
            page = self._pages.pop(at)
            page.shadow.maps -= 1
            self.machine.unmerged -= not page.shadow.maps
            if page.frame is not None:
                page.frame.maps -= 1
                self.machine.used -= not page.frame.maps
            self._leave_segment(page)

    def fork(self, pid: int) -> SimulatedAddressSpace:
        """A child that shares every page; to its agent all of them are new."""
        child = SimulatedAddressSpace(
            self.machine,
            pid,
            domain=self.domain,
            tracking=self.tracking,
            rehash_broken=self.rehash_broken,
            step=self.step,
            hash_bits=self.hash_bits,
            map_limit=self.map_limit,
            nodes=self.nodes,
        )
        child._areas = list(self._areas)
        for vpn, page in self._pages.items():
            page.shadow.maps += 1
            if page.frame is not None:
                page.frame.maps += 1
            if page.segment is not None:
                page.segment.maps += 1
            child._pages[vpn] = _Page(page.shadow, page.frame, page.segment, page.offset, True, page.by_application)
            if page.by_application and not self.rehash_broken:
                child._seen_merged.add(vpn)
        return child

    def exit(self) -> None:
        """The process ends: its memory is free, and every call from now on finds it gone."""
        self.discard(0, 1 << 62)
        self.alive, self.halt = False, ""

    def pages(self) -> dict[int, int]:
        """Content of every page that is present."""
        return {vpn: page.content for vpn, page in self._pages.items()}

    def merged_pages(self) -> set[int]:
        """Pages that are merged, in truth."""
        return {vpn for vpn, page in self._pages.items() if page.merged}

    def extents(self) -> int:
        """Mappings its merged pages take: runs of pages that are neighbours in a segment too."""
        n = 0
        for vpn, page in self._pages.items():
            before = self._pages.get(vpn - 1)
            joined = before and before.segment is page.segment and before.offset + 1 == page.offset
            n += page.segment is not None and not joined
        return n

    # -- the agent --------------------------------------------------------------------------------------

    def _called(self, what: str) -> None:
        self.calls.append(what)
        if not self.alive:
            raise AddressSpaceGone("exited", ended=True)
        if self.halt:
            raise AddressSpaceSilent(self.pid, self.halt)

    def _fate(self, what: str, vpn: int) -> int | None:
        return self.script(what, vpn) if self.script else None

    def pages_max(self) -> int:
        return VPN_END

    def verify(self) -> None:
        self._called("verify")

    def is_there(self) -> bool:
        return self.alive

    def halted(self) -> str:
        return self.halt

    def catch_up(self) -> tuple[str, list[ScanResult]]:
        return self.halt, []

    def interruptible(self, cancelled: Callable[[], bool]) -> AbstractContextManager[None]:
        return nullcontext()

    @property
    def zero_checksum(self) -> int:
        """Of a page of zeros."""
        return self.checksum(0)

    def checksum(self, content: int) -> int:
        """Of a page: its content scrambled (Fibonacci hashing), of which the low `hash_bits` are kept."""
        scrambled = (content + 1) * 0x9E3779B97F4A7C15 & MASK
        return (scrambled ^ scrambled >> 29) & ((1 << self.hash_bits) - 1)

    def _checksum_at(self, vpn: int, content: int, flags: ScanFlag) -> int:
        node = vpn % self.nodes if content and flags & ScanFlag.NODES else 0
        return self.checksum(content + (node << 32))

    def areas(self) -> Areas:
        """See `AddressSpace.areas`."""
        self._called("areas")
        return Areas(self._areas_seq, np.array(self._areas, AREA))

    def _mergeable(self, vpn: int) -> bool:
        return any(start <= vpn < start + n for start, n in self._areas)

    def scan(self, vpn: int, budget: int, flags: ScanFlag = ScanFlag.NONE, end: int = VPN_END) -> ScanResult:
        """See `AddressSpace.scan`."""
        self._called("scan")
        runs: list[tuple[int, int, int, int, int]] = []
        sums: list[int] = []
        here = sorted(at for at in self._pages.keys() | self._seen_merged if at >= vpn and self._mergeable(at))
        for at in here:
            if at >= end or len(sums) >= min(budget, self.step):
                return self._scanned(runs, sums, at)
            self._fate("scan", at)
            self._look(at, runs, sums, flags)
        return self._scanned(runs, sums, 0)

    def _look(self, vpn: int, runs: list[tuple[int, int, int, int, int]], sums: list[int], flags: ScanFlag) -> None:
        page = self._pages.get(vpn)
        was_merged = vpn in self._seen_merged
        if page is None:
            if was_merged:
                self._seen_merged.discard(vpn)
                _append(runs, vpn, RunKind.GONE, 0, 0)
        elif page.merged:
            if not was_merged and page.segment is not None:
                self._seen_merged.add(vpn)
                _append(runs, vpn, RunKind.FOUND, page.segment.ino, page.offset)
        else:
            island = page.by_application and not self.rehash_broken
            if was_merged and page.by_application and flags & ScanFlag.STILL:
                return
            self._seen_merged.discard(vpn)
            if was_merged and (island or not page.by_application):
                _append(runs, vpn, RunKind.BROKEN if island else RunKind.GONE, 0, 0)
            if not island and (page.written or not self.tracking or flags & ScanFlag.ALL):
                page.written = False
                sums.append(self._checksum_at(vpn, page.content, flags))
                _append(runs, vpn, RunKind.HASHED, 0, 0)
                self.pages_hashed += 1

    def _scanned(self, runs: list[tuple[int, int, int, int, int]], sums: list[int], next_vpn: int) -> ScanResult:
        checksums: U64 = np.array(sums, np.uint64)
        return ScanResult(np.array(runs, RUN), checksums, next_vpn, self._areas_seq, 1000 * len(sums), self.forked)

    def donate(self, runs: npt.NDArray[np.void]) -> Donation:
        """See `AddressSpace.donate`."""
        self._called("donate")
        content: list[int] = []
        status = [self._donate(vpn, content) for vpn in _pages_of(runs)]
        segment = self.machine.new_segment(content) if content else None
        return Donation(segment, np.array(status, np.uint8))

    def _donate(self, vpn: int, content: list[int]) -> int:
        fate = self._fate("donate", vpn)
        page = self._pages.get(vpn)
        if fate is not None:
            return fate
        if page is None or page.frame is None or not self._mergeable(vpn):
            return PageStatus.GONE
        if page.frame.maps > 1:
            return PageStatus.BUSY
        if self.machine.headroom <= len(content):
            return PageStatus.NOMEM
        content.append(page.content)
        return PageStatus.DONE

    def merge(self, segment: Segment | None, extents: npt.NDArray[np.void]) -> MergeResult:
        """See `AddressSpace.merge`."""
        self._called("merge")
        assert segment is None or isinstance(segment, SimulatedSegment)
        status = []
        for extent in extents:
            vpn, npages, offset = (int(extent[name]) for name in ("vpn", "npages", "offset"))
            for i in range(npages):
                status.append(self._merge(vpn + i, None if offset == ZERO_PAGE else segment, offset + i))
        return MergeResult(np.array(status, np.uint8))

    def _merge(self, vpn: int, segment: SimulatedSegment | None, offset: int) -> int:
        fate = self._fate("merge", vpn)
        page = self._pages.get(vpn)
        if fate is not None:
            return fate
        if page is None or page.frame is None or not self._mergeable(vpn):
            return PageStatus.GONE
        if page.frame.maps > 1:
            return PageStatus.BUSY
        if page.by_application and not self.rehash_broken:
            return PageStatus.REFUSED
        if page.frame.content != (segment.content[offset] if segment else 0):
            return PageStatus.DIFFERENT
        if segment is not None:
            assert segment.is_open, "merged with a segment that was closed"
            segment.maps += 1
        page.frame, page.segment, page.offset = None, segment, offset
        self.machine.used -= 1
        self._seen_merged.add(vpn)
        return PageStatus.DONE

    def break_ksm(self, vpn: int, npages: int) -> BreakResult:
        """See `AddressSpace.break_ksm`."""
        self._called("break")
        result = BreakResult()
        for at in [p for p in self._in(self._pages, vpn, npages) if self._pages[p].merged and self._mergeable(p)]:
            result.errno = self._break(at)
            if result.errno:
                break
            result.pages_unmerged += 1
        if not result.errno:  # ksmd knows as much now; otherwise the next scan tells it
            self._seen_merged.difference_update(self._in(self._seen_merged, vpn, npages))
        result.pages_remaining = sum(
            self._pages[p].merged and self._mergeable(p) for p in self._in(self._pages, vpn, npages)
        )
        result.bytes_needed = (1 + self.machine.reserve) * PAGE_SIZE
        result.bytes_available = (self.machine.limit - self.machine.used) * PAGE_SIZE
        return result

    def _break(self, vpn: int) -> int:
        while (fault := self._fate("break", vpn)) == errno.EAGAIN:
            self.faults += 1
        page = self._pages.get(vpn)
        if fault or page is None or not page.merged:
            return fault or 0
        if not self.machine.headroom:
            return errno.ENOMEM
        self.faults += 1
        self._unshare_shadow(page)  # a break is a write fault: what a fork shared is private from now on, too
        self._give_copy(page)
        page.written = True  # to the agent it is new memory
        return 0

    def restore(self, runs: npt.NDArray[np.void]) -> RestoreResult:
        """See `AddressSpace.restore`."""
        self._called("restore")
        result = RestoreResult()
        for vpn in _pages_of(runs):
            fate = self._fate("restore", vpn)
            page = self._pages.get(vpn)
            if page is None or page.frame is None or not page.by_application or not self._mergeable(vpn):
                continue
            if fate is not None or vpn in self.pinned or page.frame.maps > 1 or not self.machine.headroom:
                result.pages_left += 1
                continue
            page.by_application, page.written = False, True
            result.pages_restored += 1
        return result

    def present(self, vpn: int, npages: int) -> npt.NDArray[np.void]:
        """See `AddressSpace.present`."""
        here = self._in(self._pages, vpn, npages)
        return np.array([(at, 1) for at in here if self._pages[at].frame or self._pages[at].segment], AREA)

    def map_count(self) -> tuple[int, int]:
        """See `AddressSpace.map_count`: an area is one mapping, an extent within it two more."""
        self._called("map_count")
        return len(self._areas) + 2 * self.extents(), self.map_limit

    def headroom(self) -> tuple[str, int]:
        """See `AddressSpace.headroom`: a machine is one group."""
        self._called("headroom")
        return self.machine.name, (self.machine.limit - self.machine.used) * PAGE_SIZE


def _append(runs: list[tuple[int, int, int, int, int]], vpn: int, kind: RunKind, ino: int, offset: int) -> None:
    """Add a page to the last run if it continues it, else as a new one."""
    if runs:
        last = runs[-1]
        if last[0] + last[1] == vpn and last[2] == kind and last[3] == ino and (not ino or last[4] + last[1] == offset):
            runs[-1] = (last[0], last[1] + 1, *last[2:])
            return
    runs.append((vpn, 1, int(kind), ino, offset))


def _pages_of(runs: npt.NDArray[np.void]) -> Iterator[int]:
    for run in runs:
        yield from range(int(run["vpn"]), int(run["vpn"] + run["npages"]))
