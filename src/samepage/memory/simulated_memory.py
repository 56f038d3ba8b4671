"""The memory of simulated processes, as the machine and the application see it.

The content of a page is a number, 0 for zeros; its checksum is that number scrambled, cut to a few bits where
collisions are wanted. A `SimulatedMachine` has the memory and counts it, in two ways: what is in use, and what would
be if nobody had ever merged anything. The difference is the truth that `bytes_saved` is checked against.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Self

from samepage.process.merge_domain import MergeDomain

MASK = (1 << 64) - 1


class OutOfMemory(Exception):
    """The application wrote more than the machine has: where a real one would wake the OOM killer."""


class Frame:
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
class Page:
    """A present page. `shadow` is the frame it would have if nothing had ever been merged."""

    shadow: Frame
    frame: Frame | None
    segment: SimulatedSegment | None = None
    offset: int = 0
    written: bool = True  # since it was looked at
    by_application: bool = False  # its copy-on-write was broken by a write

    @property
    def merged(self) -> bool:
        """With a segment, or the zero page."""
        return self.frame is None

    @property
    def content(self) -> int:
        """What is in it."""
        if self.frame is not None:
            return self.frame.content
        return self.segment.content[self.offset] if self.segment else 0


class SimulatedMemory:
    """The pages of one process, and what its application does with them. The parameters are those of
    `SimulatedAddressSpace`."""

    def __init__(
        self,
        machine: SimulatedMachine,
        pid: int,
        *,
        domain: MergeDomain | int = 0,
        tracking: bool = True,
        rehash_broken: bool = True,
        step: int = 1 << 30,
        hash_bits: int = 64,
        map_limit: int = 1 << 30,
        nodes: int = 1,
    ) -> None:
        self.machine = machine
        self.pid = pid
        self.domain = domain if isinstance(domain, MergeDomain) else MergeDomain(domain)
        self.owner = self.domain
        self.tracking = tracking
        self.rehash_broken = rehash_broken
        self.step = step
        self.hash_bits = hash_bits
        self.map_limit = map_limit
        self.nodes = nodes
        self.alive = True
        self.halt = ""  # what keeps it from answering
        self.pinned: set[int] = set()  # pages that somebody holds, for I/O
        self.unnamed: set[int] = set()  # pages of areas that nobody named
        self._areas: list[tuple[int, int]] = []  # (vpn, npages), ascending, disjoint
        self._areas_seq = 0
        self._pages: dict[int, Page] = {}
        self._seen_merged: set[int] = set()  # pages that were merged when last looked at

    def map_area(self, vpn: int, npages: int, named: bool = True) -> None:
        """A new mergeable area; `named`: see `ScanFlag.NAMED`."""
        if not named:
            self.unnamed |= set(range(vpn, vpn + npages))
        self._areas = sorted([*self._areas, (vpn, npages)])
        self._areas_seq += 1

    def unmap(self, vpn: int, npages: int) -> None:
        """The range is no more. If it is mapped again before the next scan, its merged pages are reported GONE."""
        self.discard(vpn, npages)
        self._cut_areas(vpn, npages)

    def mremap(self, vpn: int, npages: int, to: int) -> None:
        """Move a range of pages elsewhere; there they are new to the agent."""
        moved = {at: self._pages.pop(at) for at in within(self._pages, vpn, npages)}
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

    def write(self, vpn: int, *contents: int) -> None:
        """Write pages from `vpn` on; copy-on-write is the kernel's."""
        for at, content in enumerate(contents, vpn):
            self._write(at, content)

    def _write(self, vpn: int, content: int) -> None:
        page = self._pages.get(vpn)
        if page is None:
            self.machine.take()
            self.machine.unmerged += 1
            self._pages[vpn] = Page(Frame(content), Frame(content))
            return
        self._unshare_shadow(page)
        if page.merged:
            self._give_copy(page)
            page.by_application = True
        elif page.frame is not None and page.frame.maps > 1:
            self.machine.take()
            page.frame.maps -= 1
            page.frame = Frame(content)
        assert page.frame is not None
        page.frame.content = page.shadow.content = content
        page.written = True

    def _unshare_shadow(self, page: Page) -> None:
        if page.shadow.maps > 1:
            page.shadow.maps -= 1
            page.shadow = Frame(page.content)
            self.machine.unmerged += 1

    def _give_copy(self, page: Page) -> None:
        self.machine.take()
        content = page.content
        self._leave_segment(page)
        page.frame = Frame(content)

    def _leave_segment(self, page: Page) -> None:
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
        for at in within(self._pages, vpn, npages):
            page = self._pages.pop(at)
            page.shadow.maps -= 1
            self.machine.unmerged -= not page.shadow.maps
            if page.frame is not None:
                page.frame.maps -= 1
                self.machine.used -= not page.frame.maps
            self._leave_segment(page)

    def fork(self, pid: int) -> Self:
        """A child that shares every page; to its agent all of them are new."""
        child = type(self)(
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
        child._areas, child.unnamed = list(self._areas), set(self.unnamed)
        for vpn, page in self._pages.items():
            page.shadow.maps += 1
            if page.frame is not None:
                page.frame.maps += 1
            if page.segment is not None:
                page.segment.maps += 1
            child._pages[vpn] = Page(page.shadow, page.frame, page.segment, page.offset, True, page.by_application)
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

    def mappings(self) -> int:
        """Mappings its areas take: one for each extent, and one for each stretch between them."""
        n = self.extents()
        for start, npages in self._areas:
            merged = sorted(at for at in within(self._pages, start, npages) if self._pages[at].segment is not None)
            ends = [start - 1, *merged, start + npages]
            n += sum(after > before + 1 for before, after in pairwise(ends))
        return n

    def checksum(self, content: int) -> int:
        """Of a page: its content scrambled (Fibonacci hashing), of which the low `hash_bits` are kept."""
        scrambled = (content + 1) * 0x9E3779B97F4A7C15 & MASK
        return (scrambled ^ scrambled >> 29) & ((1 << self.hash_bits) - 1)

    def _mergeable(self, vpn: int) -> bool:
        return any(start <= vpn < start + n for start, n in self._areas)


def within(pages: Iterable[int], vpn: int, npages: int) -> list[int]:
    """Those of `pages` that lie in a range, ascending."""
    return sorted(at for at in pages if vpn <= at < vpn + npages)
