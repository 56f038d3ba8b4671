"""Nothing a process says is believed before it was looked at here.

An answer that could put ksmd or another process in the wrong (runs outside the areas, lengths that do not
fit, unknown codes) makes the process gone: `AddressSpaceGone`. What a process says of the *content* of its
pages needs no check: whoever merges with it compares the bytes.
"""

from __future__ import annotations

import errno

import numpy as np
import numpy.typing as npt

from samepage.ksmd.mm_slot import Structured
from samepage.ksmd.stable import SEGMENT_PAGES
from samepage.memory import (
    AREA,
    DONE,
    LAST_STATUS,
    RUN,
    VPN_END,
    AddressSpaceGone,
    Areas,
    BreakResult,
    Donation,
    MergeResult,
    RunKind,
    ScanResult,
)

AREA_PAGES_MAX = 1 << 31
"""Pages one process may register (8 TiB): it must not use up the refs of its whole domain."""

BREAK_ERRNOS = (0, errno.ENOMEM, errno.EINTR, errno.EFAULT)


def _require(sound: bool | np.bool_, what: str) -> None:
    if not sound:
        raise AddressSpaceGone(f"talks nonsense: {what}")


def _disjoint(runs: Structured, what: str) -> None:
    vpn, npages = runs["vpn"], runs["npages"].astype(np.uint64)
    _require(np.all((vpn < VPN_END) & (npages > 0) & (npages < VPN_END)), f"{what} out of range")
    _require(np.all(vpn[1:] >= vpn[:-1] + npages[:-1]), f"{what} overlap or are not sorted")


def areas(areas: Areas) -> None:
    """Areas must be ascending, disjoint, and not more than can be kept."""
    ranges = areas.ranges
    _require(ranges.dtype == AREA and ranges.ndim == 1, "areas of another type")
    _disjoint(ranges, "areas")
    _require(ranges["npages"].astype(np.float64).sum() <= AREA_PAGES_MAX, "too many pages")


def scanned(reply: ScanResult, vpn: int) -> None:
    """Runs must be ascending and disjoint, those of GONE pages for themselves; checksums as many as hashed pages; and
    the scan must get on."""
    runs, sums = reply.runs, reply.checksums
    _require(runs.dtype == RUN and runs.ndim == 1, "runs of another type")
    _require(sums.dtype == np.uint64 and sums.ndim == 1, "checksums of another type")
    hashed = 0
    if len(runs):
        gone = runs["kind"] == RunKind.GONE
        _disjoint(runs[gone], "runs")
        _disjoint(runs[~gone], "runs")
        _require(np.all(runs["kind"] <= max(RunKind)), "unknown kind of run")
        hashed = int(runs["npages"][runs["kind"] == RunKind.HASHED].sum(dtype=np.uint64))
    _require(hashed == len(sums), "checksums do not match the runs")
    _require(reply.next_vpn == 0 or vpn < reply.next_vpn <= VPN_END, "the scan goes backwards")
    _require(reply.cpu_ns >= 0, "negative CPU time")


def _statuses(status: npt.NDArray[np.uint8], npages: int) -> None:
    _require(status.dtype == np.uint8 and status.shape == (npages,), "not one status a page")
    _require(not npages or status.max() <= LAST_STATUS, "unknown page status")


def donated(donation: Donation, npages: int) -> None:
    """A segment must hold exactly the pages that were donated."""
    _statuses(donation.status, npages)
    done = int(np.count_nonzero(donation.status == DONE))
    held = donation.segment.npages if donation.segment else 0
    _require(done == held and done <= SEGMENT_PAGES and donation.cpu_ns >= 0, "a segment not as asked for")


def merged(result: MergeResult, npages: int) -> None:
    """One known status for every page."""
    _statuses(result.status, npages)
    _require(result.cpu_ns >= 0, "negative CPU time")


def broken(result: BreakResult, npages: int) -> None:
    """Counts must fit the range, and the error must be one that a break can have."""
    _require(result.errno in BREAK_ERRNOS, "unknown errno of a break")
    counts_fit = 0 <= result.pages_unmerged <= npages and 0 <= result.pages_remaining <= npages
    _require(counts_fit and result.bytes_needed >= 0 and result.bytes_available >= 0, "counts of a break do not fit")


def headroom(found: tuple[str, int]) -> None:
    """Bytes cannot be negative."""
    _require(found[1] >= 0, "negative headroom")


def map_count(count: tuple[int, int]) -> None:
    """Neither number can be negative."""
    _require(count[0] >= 0 and count[1] >= 0, "negative mappings")
