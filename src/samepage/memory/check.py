"""Nothing a process says is believed before it was checked here.

An answer that could put ksmd or another process in the wrong (impossible addresses, runs that overlap, lengths that do
not fit, unknown codes) makes the process gone: `AddressSpaceGone`. So ksmd can rely on every answer being possible;
whether it fits the areas of the process, ksmd checks itself. What a process says of the *content* of its pages needs no
check: every process that merges with it compares the bytes.
"""

from __future__ import annotations

import errno
import math
import operator

import numpy as np
import numpy.typing as npt

from samepage.memory import (
    DONE,
    LAST_STATUS,
    STALLS_US,
    USER_END,
    AddressSpaceGone,
    BreakResult,
    Donation,
    PageStatus,
    RestoreResult,
    RunKind,
    ScanResult,
)

AREAS_MAX = 1 << 20
"""The most areas of one process: sixteen times the mappings that it may have unless vm.max_map_count was raised."""

AREA_PAGES_MAX = 1 << 31
"""The most pages that one process may register (8 TiB)."""

COMPARED = (np.uint8(PageStatus.DIFFERENT), np.uint8(PageStatus.NOMAP))
"""Statuses that a page which was to be donated cannot have: nothing is compared with it, nor mapped."""

BREAK_ERRNOS = (0, errno.ENOMEM, errno.EINTR, errno.EFAULT)


Structured = npt.NDArray[np.void]


class Nonsense(AddressSpaceGone):
    """An answer that cannot be true."""

    def __init__(self, what: str) -> None:
        super().__init__(f"talks nonsense: {what}")


def _require(sound: bool | np.bool_, what: str) -> None:
    if not sound:
        raise Nonsense(what)


def disjoint(runs: Structured, what: str) -> None:
    """Each run must have pages, none an impossible address, and each end before the next begins."""
    vpn, npages = runs["vpn"], runs["npages"].astype(np.uint64)
    in_range = (vpn < USER_END) & (npages > 0) & (npages <= USER_END)
    _require(np.all(in_range) and np.all(vpn + npages <= USER_END), f"{what} out of range")
    _require(np.all(vpn[1:] >= vpn[:-1] + npages[:-1]), f"{what} overlap or are not sorted")


def part_of_areas(part: Structured, start: int, next_vpn: int) -> None:
    """Areas must be possible ones, none of them before `start`; and if the list goes on, past all it told."""
    disjoint(part, "areas")
    _require(not len(part) or int(part["vpn"][0]) >= start, "areas out of order")
    last = int(part["vpn"][-1] + part["npages"][-1]) if len(part) else USER_END
    _require(not next_vpn or last <= next_vpn < USER_END, "a list of areas without an end")


def areas(count: int, npages: int) -> None:
    """There must not be more areas than can be kept. Checked while the list is still coming, which might never end."""
    _require(count <= AREAS_MAX, f"more than {AREAS_MAX} areas")
    _require(npages <= AREA_PAGES_MAX, "areas of too many pages")


def scanned(reply: ScanResult, vpn: int, budget: int) -> None:
    """Runs must be ascending and disjoint, those of GONE pages for themselves, and none before `vpn`; checksums as many
    as hashed pages, and no more than `budget`; and the scan must get on, past all it told."""
    runs, sums = reply.runs, reply.checksums
    hashed, past = 0, vpn + 1
    if len(runs):
        gone = runs["kind"] == RunKind.GONE
        disjoint(runs[gone], "runs")
        disjoint(runs[~gone], "runs")
        _require(np.all(runs["kind"] <= max(RunKind)), "unknown kind of run")
        _require(int(runs["vpn"].min()) >= vpn, "pages before the start of the scan")
        there = runs[~gone]
        past = int(there["vpn"][-1]) + int(there["npages"][-1]) if len(there) else past
        hashed = int(runs["npages"][runs["kind"] == RunKind.HASHED].sum(dtype=np.uint64))
    _require(len(sums) <= budget, f"{len(sums)} checksums; {budget} were asked for")
    _require(hashed == len(sums), "checksums do not match the runs")
    _require(reply.next_vpn == 0 or past <= reply.next_vpn < USER_END, "the scan does not go on")
    _require(reply.cpu_ns >= 0, "negative CPU time")
    counts = reply.stalls.counts
    least = sum(map(operator.mul, counts[1:], STALLS_US)) * 1000
    most = math.inf if counts[-1] else sum(map(operator.mul, counts, STALLS_US)) * 1000
    _require(least <= reply.stalls.ns <= most, "stalls that were longer or shorter than they are counted for")


def statuses(status: npt.NDArray[np.uint8], npages: int, told_of: int | None = None) -> None:
    """One known status for every page. `told_of`: how many pages the answer says it is about."""
    _require(told_of in (None, npages), "an answer about other pages")
    _require(status.dtype == np.uint8 and status.shape == (npages,), "not one status a page")
    _require(not npages or status.max() <= LAST_STATUS, "unknown page status")


def donated(donation: Donation, npages: int) -> None:
    """A segment must hold exactly the pages that were donated, and one at least."""
    statuses(donation.status, npages)
    _require(not np.isin(donation.status, COMPARED).any(), "a donation that failed as none can")
    done = int(np.count_nonzero(donation.status == DONE))
    held = donation.segment.npages if donation.segment else None
    _require(
        (done or None) == held, f"{done} pages donated, {'no segment' if held is None else f'a segment of {held}'}"
    )
    _require(donation.cpu_ns >= 0, "negative CPU time")


def broken(result: BreakResult, npages: int) -> None:
    """Counts must fit the range, and the error must be one that a break can have."""
    _require(result.errno in BREAK_ERRNOS, "unknown errno of a break")
    counts_fit = min(result.pages_unmerged, result.pages_remaining) >= 0
    counts_fit &= result.pages_unmerged + result.pages_remaining <= npages
    _require(counts_fit and result.bytes_needed >= 0 and result.bytes_available >= 0, "counts of a break do not fit")


def restored(result: RestoreResult, npages: int) -> None:
    """Counts must fit what was asked for."""
    counts_fit = result.pages_restored + result.pages_left <= npages and result.cpu_ns >= 0
    _require(counts_fit, "counts of a restore do not fit")
