"""Restoring pages that were merged and then written: only as ordinary memory can they be merged again.

The kernel needs nothing like this: its page is ordinary as soon as it leaves a stable node. Here it costs the process
some microseconds a page, which pays once the writing has ended: for weights that were loaded over initialised memory,
say. So ksmd restores pages that were found broken two passes ago or earlier, and only long runs of them, since each run
takes a mapping.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np

from samepage.arrays import Ints, expand, run_starts
from samepage.ksmd.domain import Domain
from samepage.ksmd.merge_work import MergeWork
from samepage.ksmd.mm_slot import MmSlot, Structured
from samepage.ksmd.patience import A_MOMENT
from samepage.ksmd.rmap import PageState
from samepage.memory import AREA

QUIET_PASSES = 2
"""For how many passes a page must have been known as broken."""

RUN_PAGES = 16
"""Pages of the shortest run that is restored (64 KiB)."""

BATCH_PAGES, BATCH_RUNS = 1 << 14, 256
"""The most pages and runs of one process in one pass: 64 MiB, which take it some 60 ms."""

RESTORE_RATE = 1 << 14
"""Pages a second, at worst, that a process restores (64 MiB)."""

PATIENCE_MAX = 64
"""The most passes between two attempts, when the first restored nothing."""


def restore(domain: Domain, slots: Iterable[MmSlot], work: MergeWork) -> bool:
    """Let processes restore pages that have been broken for long enough. Returns whether any page was restored."""
    runs = {slot: _due(domain, slot, work.passes) for slot in slots if slot.may_have_islands(work.passes)}
    for slot, found in runs.items():
        if not len(found):
            slot.islands_in_vain(work.passes, PATIENCE_MAX)
    asked = {slot: found for slot, found in runs.items() if len(found)}
    restored = False
    for slot, n in work.each(asked, lambda slot: _ask(slot, asked[slot])).items():
        if n:
            slot.islands_due, slot.islands_attempts = work.passes, 0
            restored = True
        else:
            slot.islands_in_vain(work.passes, PATIENCE_MAX)
        _asked(domain, slot, asked[slot], work.passes)
    return restored


def restore_range(domain: Domain, slot: MmSlot, vpn: int, npages: int) -> bool:
    """The same for one process and all that is broken in a range, now."""
    found = [run for pages in domain.known(slot, vpn, npages) for run in _broken_runs(domain, *pages, None)]
    return bool(found) and bool(_ask(slot, np.array(found, AREA)))


def _ask(slot: MmSlot, runs: Structured) -> int:
    started, restored = time.perf_counter_ns(), 0
    for at in range(0, len(runs), BATCH_RUNS):
        part = runs[at : at + BATCH_RUNS]
        with slot.waited_for(A_MOMENT + int(part["npages"].sum()) / RESTORE_RATE):
            result = slot.space.restore(part)
        restored += result.pages_restored
        slot.cpu_ns += min(result.cpu_ns, time.perf_counter_ns() - started)
        started = time.perf_counter_ns()
    return restored


def _due(domain: Domain, slot: MmSlot, passes: int) -> Structured:
    """Long runs of pages that were broken long enough ago, as many as one batch takes."""
    runs: list[tuple[int, int]] = []
    pages = 0
    for known in domain.known(slot):
        for first, n in _broken_runs(domain, *known, passes - QUIET_PASSES, RUN_PAGES):
            runs.append((first, min(n, BATCH_PAGES - pages)))
            pages += runs[-1][1]
            if pages == BATCH_PAGES or len(runs) == BATCH_RUNS:
                return np.array(runs, AREA)
    return np.array(runs, AREA)


def _broken_runs(domain: Domain, vpns: Ints, refs: Ints, before: int | None, least: int = 1) -> list[tuple[int, int]]:
    """Runs (vpn, pages) of `least` broken pages or more, of those that broke in pass `before` or earlier unless that is
    None."""
    broken = domain.state[refs] == PageState.BROKEN
    if before is not None:
        broken &= domain.checksum[refs] <= max(0, before)
    vpns = vpns[broken]
    first = run_starts(vpns)
    lengths = np.diff(np.append(first, len(vpns)))
    long = lengths >= least
    return list(zip(vpns[first[long]].tolist(), lengths[long].tolist(), strict=True))


def _asked(domain: Domain, slot: MmSlot, runs: Structured, passes: int) -> None:
    """Note what was asked. The next scan shows which pages were restored; those that were not come after all others."""
    start = runs["vpn"].astype(np.int64)
    _, _, ref, length = slot.pieces.locate(start, start + runs["npages"].astype(np.int64))
    refs = expand(ref, length)
    domain.checksum[refs[domain.state[refs] == PageState.BROKEN]] = passes
