"""A recorded process as an address space: what `samepage.memory.simulated` is to a test, for millions of pages.

The content is the recorded hash. Nothing changes between two looks. At a look, a page with another content counts as
written, and a page that is gone as discarded. What came and went in between is unknown.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from samepage.arrays import Bools, Ints, expand, run_starts
from samepage.memory import (
    AREA,
    RUN,
    U64,
    VPN_END,
    ZERO_PAGE,
    AddressSpaceGone,
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
)
from samepage.process.merge_domain import MergeDomain

PRIVATE, ZERO = -1, -2
"""The offset of a page that is in no segment: it is the process's own, or merged with the zero page."""

STEP_PAGES = 1 << 17
"""The most pages hashed in one answer: to the caller, a longer answer would look like a process that hangs."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of CPU that an engine takes: to look at a page; to merge an extent, and each page of it; to make a page
    ordinary memory again."""

    looked: float
    extent: float
    page: float
    restored: float


class Meter:
    """CPU seconds spent so far. A page of a sample stands for `scale` pages."""

    def __init__(self, costs: Costs, scale: float) -> None:
        self.costs, self.scale, self.seconds = costs, scale, 0.0

    def spend(self, each: float, times: int) -> None:
        """Add CPU seconds for something that was done several times."""
        self.seconds += each * times * self.scale


@dataclass(slots=True)
class Content:
    """The pages of a process in one look, ascending by `vpn`. `areas` (dtype `AREA`) can be merged."""

    vpn: Ints
    content: U64
    forked: Bools
    areas: npt.NDArray[np.void]
    map_count: int = 0


class RecordedSegment:
    """A copy of pages."""

    def __init__(self, ino: int, content: U64) -> None:
        self.ino, self.content = ino, content

    @property
    def npages(self) -> int:
        """Pages in it."""
        return len(self.content)

    def close(self) -> None:
        """Nothing is held."""


class RecordedAddressSpace:
    """A recorded process. `in_place`: as with the kernel's KSM, a page that was merged and then written can be merged
    again where it is, and pages that a fork shares can be merged."""

    zero_checksum = 0

    def __init__(self, pid: int, domain: int, meter: Meter, in_place: bool, map_limit: int) -> None:
        self.pid = pid
        self.domain = self.owner = MergeDomain(domain)
        self._meter, self._in_place, self._map_limit = meter, in_place, map_limit
        self.alive = True
        self._areas, self._areas_seq, self._map_count = np.empty(0, AREA), 0, 0
        self._vpn: Ints = np.empty(0, np.int64)
        self._gone: Ints = np.empty(0, np.int64)  # were merged, and are to be told of
        self._news = False
        self._resize(0)

    def _resize(self, npages: int) -> None:
        self._content: U64 = np.zeros(npages, np.uint64)
        self._segment = np.full(npages, PRIVATE, np.int32)  # ino
        self._offset = np.zeros(npages, np.int64)
        self._written, self._forked, self._inside = (np.zeros(npages, np.bool_) for _ in range(3))
        self._broken = np.zeros(npages, np.bool_)  # by the application, and not restored since
        self._told = np.zeros(npages, np.bool_)  # that it is merged

    # -- the application --------------------------------------------------------------------------------

    def becomes(self, now: Content) -> int:
        """Become what the next look saw. Returns how many merged pages the application wrote."""
        old: tuple[npt.NDArray[Any], ...] = (
            self._vpn,
            self._content,
            self._segment,
            self._offset,
            self._written,
            self._broken,
            self._told,
        )
        place = np.minimum(np.searchsorted(old[0], now.vpn), max(len(old[0]) - 1, 0))
        known = old[0][place] == now.vpn if len(old[0]) else np.zeros(len(now.vpn), np.bool_)
        at = place[known]
        stays = np.zeros(len(old[0]), np.bool_)
        stays[at] = True
        self._gone = np.union1d(self._gone, old[0][~stays & old[6]])
        self._vpn = now.vpn
        self._resize(len(now.vpn))
        self._content[:], self._forked[:] = now.content, now.forked
        self._written[:] = True
        kept: tuple[npt.NDArray[Any], ...] = (self._segment, self._offset, self._written, self._broken, self._told)
        for mine, before in zip(kept, old[2:], strict=True):
            mine[known] = before[at]
        changed = np.zeros(len(now.vpn), np.bool_)
        changed[known] = now.content[known] != old[1][at]
        wrote = changed & (self._segment != PRIVATE)
        self._segment[wrote] = PRIVATE
        self._broken |= wrote
        self._written |= changed
        if not np.array_equal(now.areas, self._areas):
            self._areas = now.areas
            self._areas_seq += 1
        self._map_count = now.map_count
        self._inside = self._within(self._vpn)
        self._gone = self._gone[self._within(self._gone)]
        self._news = True
        return int(np.count_nonzero(wrote))

    def _within(self, vpn: Ints) -> Bools:
        start = self._areas["vpn"].astype(np.int64)
        at = np.searchsorted(start, vpn, "right") - 1
        end = np.append(start + self._areas["npages"].astype(np.int64), 0)
        inside: Bools = (at >= 0) & (vpn < end[at])
        return inside

    def exit(self) -> None:
        """The process ended."""
        self.alive = False

    # -- the agent --------------------------------------------------------------------------------------

    def _called(self) -> None:
        if not self.alive:
            raise AddressSpaceGone("exited", ended=True)

    def stirring(self) -> None:
        return None

    def is_there(self) -> bool:
        return self.alive

    def halted(self) -> str:
        return ""

    def starved(self) -> float:
        return 0.0

    def catch_up(self) -> tuple[str, list[ScanResult]]:
        return "", []

    def interruptible(self, cancelled: Callable[[], bool]) -> AbstractContextManager[None]:
        return nullcontext()

    def misplaced(self) -> str:
        return ""

    def verify(self) -> None:
        self._called()

    def pages_max(self) -> int:
        return VPN_END

    def areas(self) -> Areas:
        """See `AddressSpace.areas`."""
        self._called()
        return Areas(self._areas_seq, self._areas)

    def scan(self, vpn: int, budget: int, flags: ScanFlag = ScanFlag.NONE, end: int = VPN_END) -> ScanResult:
        """See `AddressSpace.scan`."""
        self._called()
        first, past = np.searchsorted(self._vpn, [vpn, end]).tolist()
        if not self._news and not flags & ScanFlag.ALL:
            return self._scanned([], past)
        here = np.flatnonzero(self._inside[first:past]) + first
        private = self._segment[here] == PRIVATE
        island = self._broken[here] & (not self._in_place)
        told = self._told[here]
        tell = told & island & private
        hashed = private & ~island & (self._written[here] if not flags & ScanFlag.ALL else True)
        if flags & ScanFlag.STILL:
            tell[:] = False
            hashed &= ~(told & self._broken[here])
        counted = np.flatnonzero(hashed)
        past_look = past
        if len(counted) > (most := min(budget, STEP_PAGES)):
            past_look = int(here[counted[most]])
            keep = here < past_look
            here, tell, hashed = here[keep], tell[keep], hashed[keep]
        upto = int(self._vpn[past_look]) if past_look < len(self._vpn) else VPN_END
        gone = self._gone[np.searchsorted(self._gone, vpn) : np.searchsorted(self._gone, min(upto, end))]
        self._gone = np.setdiff1d(self._gone, gone, assume_unique=True)
        self._told[here[tell | hashed]] = False
        self._written[here[hashed]] = False
        if not vpn and past_look == len(self._vpn):
            self._news = bool((self._told & self._broken & ~np.bool_(self._in_place)).any()) or bool(len(self._gone))
        self._meter.spend(self._meter.costs.looked, int(np.count_nonzero(hashed)))
        runs = [
            _runs(gone, np.full(len(gone), int(RunKind.GONE))),
            _runs(self._vpn[here[tell | hashed]], np.where(tell, int(RunKind.BROKEN), 0)[tell | hashed]),
        ]
        return self._scanned(runs, past_look, self._content[here[hashed]])

    def _scanned(self, runs: list[npt.NDArray[np.void]], past: int, sums: U64 | None = None) -> ScanResult:
        inside = self._inside[past : past + 1]
        if len(inside) and not inside[0]:
            more = np.flatnonzero(self._inside[past:])
            past = past + int(more[0]) if len(more) else len(self._vpn)
        next_vpn = int(self._vpn[past]) if past < len(self._vpn) else 0
        sums = np.empty(0, np.uint64) if sums is None else sums
        return ScanResult(np.concatenate([np.empty(0, RUN), *runs]), sums, next_vpn, self._areas_seq, 0)

    def _find(self, vpns: Ints) -> tuple[Ints, Bools]:
        """The positions of these pages, and which of them exist and could be swapped."""
        at = np.searchsorted(self._vpn, vpns)
        there = at < len(self._vpn)
        at[~there] = 0
        if not len(self._vpn):
            return at, there
        return at, there & (self._vpn[at] == vpns) & self._inside[at] & (self._segment[at] == PRIVATE)

    def donate(self, runs: npt.NDArray[np.void]) -> Donation:
        """See `AddressSpace.donate`."""
        self._called()
        at, there = self._find(expand(runs["vpn"], runs["npages"]))
        status = np.full(len(at), int(PageStatus.GONE), np.uint8)
        status[there] = PageStatus.DONE
        status[there & self._busy(at, there)] = PageStatus.BUSY
        done = at[status == PageStatus.DONE]
        segment = RecordedSegment(_next_ino(), self._content[done].copy()) if len(done) else None
        return Donation(segment, status)

    def _busy(self, at: Ints, there: Bools) -> Bools:
        busy = np.zeros(len(at), np.bool_)
        if not self._in_place:
            busy[there] = self._forked[at[there]]
        return busy

    def prove_ahead(self, claims: Claims) -> None:
        """See `AddressSpace.prove_ahead`: nothing has to be proved here."""

    def merge(self, segment: Segment | None, extents: npt.NDArray[np.void]) -> MergeResult:
        """See `AddressSpace.merge`."""
        self._called()
        npages = extents["npages"].astype(np.int64)
        at, there = self._find(expand(extents["vpn"], npages))
        zeros = np.repeat(extents["offset"] == ZERO_PAGE, npages)
        offset = expand(np.where(extents["offset"] == ZERO_PAGE, 0, extents["offset"]), npages)
        content: U64 = np.zeros(len(at), np.uint64)
        ino = ZERO
        if segment is not None:
            assert isinstance(segment, RecordedSegment)
            ino = segment.ino
            content[~zeros] = segment.content[offset[~zeros]]
        status = np.full(len(at), int(PageStatus.GONE), np.uint8)
        status[there] = PageStatus.DONE
        status[there] = np.where(self._content[at[there]] == content[there], PageStatus.DONE, PageStatus.DIFFERENT)
        if not self._in_place:
            status[there] = np.where(self._broken[at[there]], np.uint8(PageStatus.REFUSED), status[there])
        status[there & self._busy(at, there)] = PageStatus.BUSY
        done = status == PageStatus.DONE
        self._segment[at[done]] = np.where(zeros[done], ZERO, ino)
        self._offset[at[done]] = offset[done]
        self._told[at[done]] = True
        self._meter.spend(self._meter.costs.extent, len(extents))
        self._meter.spend(self._meter.costs.page, len(at))
        return MergeResult(status)

    def break_ksm(self, vpn: int, npages: int) -> BreakResult:
        """See `AddressSpace.break_ksm`. There is always enough memory."""
        self._called()
        first, past = np.searchsorted(self._vpn, [vpn, vpn + npages]).tolist()
        here = np.flatnonzero(self._inside[first:past] & (self._segment[first:past] != PRIVATE)) + first
        self._segment[here], self._written[here] = PRIVATE, True
        self._told[first:past] = False
        self._news = True
        self._meter.spend(self._meter.costs.page, len(here))
        return BreakResult(pages_unmerged=len(here))

    def restore(self, runs: npt.NDArray[np.void]) -> RestoreResult:
        """See `AddressSpace.restore`."""
        self._called()
        at, there = self._find(expand(runs["vpn"], runs["npages"]))
        here = at[there]
        here = here[self._broken[here]]
        held = self._forked[here] & (not self._in_place)
        here, left = here[~held], int(np.count_nonzero(held))
        self._broken[here], self._written[here] = False, True
        self._news = True
        self._meter.spend(self._meter.costs.restored, len(here))
        return RestoreResult(len(here), left)

    def present(self, vpn: int, npages: int) -> npt.NDArray[np.void]:
        """See `AddressSpace.present`."""
        first, past = np.searchsorted(self._vpn, [vpn, vpn + npages]).tolist()
        vpns = self._vpn[first:past][self._segment[first:past] != ZERO]
        out = np.ones(len(vpns), AREA)
        out["vpn"] = vpns
        return out

    def map_count(self) -> tuple[int, int]:
        """See `AddressSpace.map_count`. An extent takes two more mappings."""
        self._called()
        merged = np.flatnonzero(self._segment >= 0)
        joined = run_starts(self._vpn[merged], self._offset[merged])
        changes = np.flatnonzero(np.diff(self._segment[merged]) != 0) + 1
        return self._map_count + 2 * len(np.union1d(joined, changes)), self._map_limit

    def headroom(self) -> tuple[str, int]:
        """See `AddressSpace.headroom`. It is unlimited."""
        self._called()
        return "/", 1 << 50


_inos = iter(range(1, 1 << 31))


def _next_ino() -> int:
    return next(_inos)


def _runs(vpns: Ints, kinds: Ints) -> npt.NDArray[np.void]:
    """Ascending pages as runs."""
    if not len(vpns):
        return np.empty(0, RUN)
    starts = np.flatnonzero((np.diff(vpns, prepend=vpns[0] - 2) != 1) | (np.diff(kinds, prepend=-1) != 0))
    runs = np.zeros(len(starts), RUN)
    runs["vpn"], runs["kind"] = vpns[starts], kinds[starts]
    runs["npages"] = np.diff(np.append(starts, len(vpns)))
    return runs
