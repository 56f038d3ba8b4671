"""Parsing the answers of a process.

An answer that is too short or too long is a `WireError`; `check` refuses one that cannot be true. Either ends the
connection."""

from __future__ import annotations

import struct
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from samepage.memory import (
    AREA,
    DONE,
    RUN,
    STALLS_US,
    U8,
    U64,
    BreakResult,
    Donation,
    PageStatus,
    RestoreResult,
    ScanResult,
    Stalls,
    check,
    wire,
)
from samepage.memory.segments import OPEN, MemfdSegment
from samepage.memory.wire import Packet

_STALLS = struct.Struct(f"<Q{len(STALLS_US) + 1}I")


def one(answer: Packet, dtype: np.dtype[np.void]) -> dict[str, Any]:
    """An answer that is one struct, as values by field name."""
    reader = answer.reader()
    found = reader.one(dtype)
    reader.end()
    return found


def areas(answer: Packet, start: int) -> tuple[dict[str, Any], npt.NDArray[np.void]]:
    """A part of the list of areas, from page `start` on: its head, and the areas."""
    reader = answer.reader()
    head = reader.one(wire.AREAS)
    part = reader.rest(AREA)
    check.part_of_areas(part, start, head["next_vpn"])
    return head, part


def scanned(answer: Packet, vpn: int, budget: int) -> ScanResult:
    """The findings of a look from `vpn` on, which was to hash at most `budget` pages."""
    reader = answer.reader()
    head = reader.one(wire.SCANNED)
    runs = reader.take(RUN, head["nruns"])
    checksums: U64 = reader.take("<u8", head["nhashed"])
    reader.end()
    forked = head["forked_ms"] / 1000
    found = ScanResult(runs, checksums, head["next_vpn"], head["areas_seq"], head["cpu_ns"], forked)
    ns, *counts = _STALLS.unpack(head["stalls"])
    if ns or any(counts):
        found.stalls = Stalls(tuple(counts), ns)
    check.scanned(found, vpn, budget)
    return found


def donated(answer: Packet, npages: int, started: int) -> Donation:
    """What became of a request for copies of `npages` pages, made at `started`."""
    cpu_ns, status = statuses(answer, npages)
    if answer.fd == wire.LOST:
        OPEN.lost += 1
        status = np.where(status == DONE, np.uint8(PageStatus.NOMEM), status)
    segment = None
    if answer.fd >= 0:
        segment = MemfdSegment(answer.take_fd(), int(np.count_nonzero(status == DONE)))
    donation = Donation(segment, status, credible(cpu_ns, started))
    try:
        check.donated(donation, npages)
    except check.Nonsense:
        donation.close()
        raise
    return donation


def statuses(answer: Packet, npages: int) -> tuple[int, U8]:
    """CPU time in ns, and the `PageStatus` of each of `npages` pages."""
    cpu_ns, status, _ = _statuses(answer, npages, 0)
    return cpu_ns, status


def proved(answer: Packet, npages: int) -> tuple[U8, list[bytes]]:
    """The `PageStatus` of each of `npages` pages, and its proof."""
    _, status, proofs = _statuses(answer, npages, wire.PROOF_SIZE)
    return status, [proofs[at : at + wire.PROOF_SIZE] for at in range(0, len(proofs), wire.PROOF_SIZE)]


def _statuses(answer: Packet, npages: int, more: int) -> tuple[int, U8, bytes]:
    """`more`: bytes for each page that follow."""
    reader = answer.reader()
    done = reader.one(wire.DONE)
    status: U8 = reader.take(np.uint8, npages)
    rest = reader.take(np.uint8, npages * more).tobytes()
    reader.end()
    check.statuses(status, npages, done["npages"])
    return done["cpu_ns"], status, rest


def broken(answer: Packet, npages: int) -> BreakResult:
    """How far a break of `npages` pages came."""
    said = one(answer, wire.BROKEN)
    result = BreakResult(
        said["error"],
        said["pages_unmerged"],
        said["pages_remaining"],
        said["bytes_needed"],
        said["bytes_available"],
        bool(said["unseen"]),
    )
    check.broken(result, npages)
    return result


def restored(answer: Packet, npages: int) -> RestoreResult:
    """How many of `npages` pages were restored."""
    said = one(answer, wire.RESTORED)
    result = RestoreResult(said["pages_restored"], said["pages_left"], said["cpu_ns"])
    check.restored(result, npages)
    return result


def credible(cpu_ns: int, started: int) -> int:
    """How much of the CPU time that a process claims can be true for its one thread."""
    return min(cpu_ns, time.perf_counter_ns() - started)
