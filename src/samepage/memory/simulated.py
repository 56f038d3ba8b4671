"""Address spaces made of dictionaries: deterministic, with a memory limit, and as faulty as a test wants them.

The *application's* side (`simulated_memory`) is `write`, `discard`, `fork`, `map_area`, `unmap`, `mremap`, `read` and
`exit`. They may be called between the calls of ksmd, and within them: from `script`, which is called with the name of
an operation and a vpn just before each page it comes to, and can also make the operation fail.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from samepage.memory import (
    AREA,
    PAGE_SIZE,
    RUN,
    VPN_END,
    ZERO_PAGE,
    AddressSpaceGone,
    AddressSpaceSilent,
    Areas,
    BreakResult,
    Claims,
    Donation,
    MergeResult,
    PageStatus,
    RestoreResult,
    RunKind,
    ScanFlag,
    ScanResult,
    Segment,
    Stirring,
)
from samepage.memory.simulated_memory import Page, SimulatedMachine, SimulatedMemory, SimulatedSegment, within

Script = Callable[[str, int], int | None]
"""`(operation, vpn)`, where the operation is "scan", "donate", "merge", "break" or "restore"; called before each page.

It may change the address space, or raise AddressSpaceGone. What it returns is the page's fate: a `PageStatus` for
"donate" and "merge", an errno for "break" (EAGAIN: the fault backs out, and is taken again), anything for "restore"
(somebody holds the page); None for no fault.
"""


@dataclass(slots=True)
class _Look:
    """What a scan found: runs (vpn, npages, kind, ino, offset), and checksums."""

    runs: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    sums: list[int] = field(default_factory=list)

    def found(self, vpn: int, kind: RunKind, ino: int = 0, offset: int = 0) -> None:
        """Add a page to the last run if it continues it, else as a new one."""
        runs = self.runs
        if runs:
            last = runs[-1]
            goes_on = last[0] + last[1] == vpn and last[2:4] == (kind, ino)
            if goes_on and (not ino or last[4] + last[1] == offset):
                runs[-1] = (last[0], last[1] + 1, *last[2:])
                return
        runs.append((vpn, 1, int(kind), ino, offset))


class SimulatedProcess(SimulatedMemory):
    """What is known of a process without asking it, and whether it answers at all."""

    def __init__(self, machine: SimulatedMachine, pid: int, **how: Any) -> None:
        super().__init__(machine, pid, **how)
        self.script: Script | None = None
        self.calls: list[str] = []
        self.stirred: Stirring | None = None
        """What `stirring` says."""
        self.elsewhere = ""
        """What `misplaced` says."""
        self.without_cpu = 0.0
        """What `starved` says next."""

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

    def stirring(self) -> Stirring | None:
        return self.stirred

    def misplaced(self) -> str:
        return self.elsewhere

    def is_there(self) -> bool:
        return self.alive

    def halted(self) -> str:
        return self.halt

    def starved(self) -> float:
        starved, self.without_cpu = self.without_cpu, 0.0
        return starved

    def catch_up(self) -> tuple[str, list[ScanResult]]:
        return self.halt, []

    def interruptible(self, cancelled: Callable[[], bool]) -> AbstractContextManager[None]:
        return nullcontext()


class SimulatedAddressSpace(SimulatedProcess):
    """One process.

    `tracking`: the kernel tells which pages were written; otherwise every scan hashes all. `rehash_broken`: pages
    whose copy-on-write the application broke are hashed and can be merged again (as when pages are swapped by
    write-protecting them; not so when they are moved). `step`: most pages one scan hashes. `hash_bits`: of checksums.
    `map_limit`: how many mappings it may have. `nodes`: NUMA nodes, on which its pages lie in turn.
    """

    def __init__(self, machine: SimulatedMachine, pid: int, **how: Any) -> None:
        super().__init__(machine, pid, **how)
        self.forked = math.inf  # so many seconds ago, as it says itself
        self.pages_hashed = 0
        self.faults = 0

    @property
    def zero_checksum(self) -> int:
        """Of a page of zeros."""
        return self.checksum(0)

    def _checksum_at(self, vpn: int, content: int, flags: ScanFlag) -> int:
        node = vpn % self.nodes if content and flags & ScanFlag.NODES else 0
        return self.checksum(content + (node << 32))

    def areas(self) -> Areas:
        """See `AddressSpace.areas`."""
        self._called("areas")
        return Areas(self._areas_seq, np.array(self._areas, AREA))

    def scan(self, vpn: int, budget: int, flags: ScanFlag = ScanFlag.NONE, end: int = VPN_END) -> ScanResult:
        """See `AddressSpace.scan`."""
        self._called("scan")
        found, next_vpn = _Look(), 0
        out = self.unnamed if flags & ScanFlag.NAMED else set()
        for at in sorted(at for at in self._pages.keys() | self._seen_merged if at >= vpn and self._mergeable(at)):
            if at in out:
                continue
            if at >= end or len(found.sums) >= min(budget, self.step):
                next_vpn = at
                break
            self._fate("scan", at)
            self._look(at, found, flags)
        runs, sums = np.array(found.runs, RUN), np.array(found.sums, np.uint64)
        return ScanResult(runs, sums, next_vpn, self._areas_seq, 1000 * len(sums), self.forked)

    def _look(self, vpn: int, found: _Look, flags: ScanFlag) -> None:
        page = self._pages.get(vpn)
        was_merged = vpn in self._seen_merged
        if page is None:
            if was_merged:
                self._seen_merged.discard(vpn)
                found.found(vpn, RunKind.GONE)
        elif page.merged:
            if not was_merged and page.segment is not None:
                self._seen_merged.add(vpn)
                found.found(vpn, RunKind.FOUND, page.segment.ino, page.offset)
        else:
            island = page.by_application and not self.rehash_broken
            if was_merged and page.by_application and flags & ScanFlag.STILL:
                return
            self._seen_merged.discard(vpn)
            if was_merged and (island or not page.by_application):
                found.found(vpn, RunKind.BROKEN if island else RunKind.GONE)
            if not island and (page.written or not self.tracking or flags & ScanFlag.ALL):
                page.written = False
                found.sums.append(self._checksum_at(vpn, page.content, flags))
                found.found(vpn, RunKind.HASHED)
                self.pages_hashed += 1

    def donate(self, runs: npt.NDArray[np.void]) -> Donation:
        """See `AddressSpace.donate`."""
        self._called("donate")
        content: list[int] = []
        status = [self._donate(vpn, content) for vpn in _pages_of(runs)]
        segment = self.machine.new_segment(content) if content else None
        return Donation(segment, np.array(status, np.uint8))

    def _in_its_place(self, what: str, vpn: int) -> Page | int:
        """A page with memory of its own; else a `PageStatus`, or what the script says."""
        fate = self._fate(what, vpn)
        page = self._pages.get(vpn)
        if fate is not None:
            return fate
        if page is None or page.frame is None or not self._mergeable(vpn):
            return PageStatus.GONE
        return page if page.frame.maps == 1 else PageStatus.BUSY

    def _donate(self, vpn: int, content: list[int]) -> int:
        page = self._in_its_place("donate", vpn)
        if not isinstance(page, Page):
            return page
        if self.machine.headroom <= len(content):
            return PageStatus.NOMEM
        content.append(page.content)
        return PageStatus.DONE

    def prove_ahead(self, claims: Claims) -> None:
        """See `AddressSpace.prove_ahead`: nothing has to be proved here."""

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
        page = self._in_its_place("merge", vpn)
        if not isinstance(page, Page):
            return page
        if page.by_application and not self.rehash_broken:
            return PageStatus.REFUSED
        if page.content != (segment.content[offset] if segment else 0):
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
        for at in [p for p in within(self._pages, vpn, npages) if self._pages[p].merged and self._mergeable(p)]:
            result.errno = self._break(at)
            if result.errno:
                break
            result.pages_unmerged += 1
        if not result.errno:  # ksmd knows as much now; otherwise the next scan tells it
            self._seen_merged.difference_update(within(self._seen_merged, vpn, npages))
        result.pages_remaining = sum(
            self._pages[p].merged and self._mergeable(p) for p in within(self._pages, vpn, npages)
        )
        result.bytes_needed = result.pages_remaining * PAGE_SIZE
        result.bytes_available = self.machine.headroom * PAGE_SIZE
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
        here = within(self._pages, vpn, npages)
        return np.array([(at, 1) for at in here if self._pages[at].frame or self._pages[at].segment], AREA)

    def map_count(self) -> tuple[int, int]:
        """See `AddressSpace.map_count`: an extent is one mapping, and so is each stretch of an area between them."""
        self._called("map_count")
        return self.mappings(), self.map_limit

    def headroom(self) -> tuple[str, int]:
        """See `AddressSpace.headroom`: a machine is one group."""
        self._called("headroom")
        return self.machine.name, (self.machine.limit - self.machine.used) * PAGE_SIZE


def _pages_of(runs: npt.NDArray[np.void]) -> Iterator[int]:
    for run in runs:
        yield from range(int(run["vpn"]), int(run["vpn"] + run["npages"]))
