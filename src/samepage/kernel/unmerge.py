"""Giving a process its own copies of what the kernel merged, batch by batch, as long as there is memory for them."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from samepage import inject
from samepage.estimate.process import KPF_KSM, KPF_ZERO_PAGE, PM_PFN, PageFlags
from samepage.kernel.attach import meant, release
from samepage.kernel.target import check
from samepage.memory import PAGE_SIZE, U64
from samepage.memory.pagemap import FILE, PRESENT
from samepage.process.mappings import Mapping, mappings

BATCH = 1 << 20
"""How many bytes of addresses one call covers."""

HOLD, REST = 0.01, 0.002
"""How long a process is held at a time, and how long it may run in between, in seconds."""

OVERHEAD = 256 << 10
"""Bytes that the kernel needs in addition (inject/unmerge.c)."""

PASSES = 8
"""How often unmerge goes over a process. What changed meanwhile is left for the next call."""

Ranges = list[tuple[int, int, int]]
"""Addresses of parts of mappings, and how many bytes of each are merged."""


@dataclass(slots=True)
class Outcome:
    """How far an unmerge came. The names are those in the JSON of `samepage unmerge`."""

    pid: int
    errno: str | None = None
    pages_unmerged: int = 0
    pages_remaining: int = 0
    bytes_needed: int = 0
    bytes_available: int = 0
    limits_unseen: bool = False


class Merged:
    """Finds pages that the kernel merged. Without root (`exact` is false), every present page may be one."""

    def __init__(self) -> None:
        self._page_flags = PageFlags()
        self.exact = self._page_flags.available

    def close(self) -> None:
        self._page_flags.close()

    def ranges(self, pid: int) -> Ranges:
        """Parts of its mergeable mappings that have merged pages, of at most `BATCH` bytes. Empty if the process has
        ended."""
        found: Ranges = []
        try:
            pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return found
        wanted = KPF_KSM | KPF_ZERO_PAGE if _has_zero_pages(pid) else KPF_KSM
        try:
            for mapping in mappings(pid):
                if mapping.mergeable:
                    found += self._of(mapping, pagemap, wanted)
        finally:
            os.close(pagemap)
        return found

    def _of(self, mapping: Mapping, pagemap: int, wanted: np.uint64) -> Iterator[tuple[int, int, int]]:
        for start in range(mapping.start, mapping.end, 256 * BATCH):
            npages = (min(mapping.end, start + 256 * BATCH) - start) // PAGE_SIZE
            entries = np.frombuffer(os.pread(pagemap, npages * 8, start // PAGE_SIZE * 8), np.uint64)
            vpns = start // PAGE_SIZE + np.flatnonzero(self._merged(entries, wanted))
            batches, counts = np.unique(vpns // (BATCH // PAGE_SIZE), return_counts=True)
            for batch, count in zip(batches.tolist(), counts.tolist(), strict=True):
                first, past = max(mapping.start, batch * BATCH), min(mapping.end, (batch + 1) * BATCH)
                yield first, past, count * PAGE_SIZE

    def _merged(self, entries: U64, wanted: np.uint64) -> np.typing.NDArray[np.bool_]:
        # Don't use EXCLUSIVE: the pagemap has that for a merged page, too, once nobody else maps it.
        merged: np.typing.NDArray[np.bool_] = (entries & PRESENT != 0) & (entries & FILE == 0)
        if self.exact:
            kpf = self._page_flags.flags(entries[merged] & PM_PFN)
            merged[merged] = kpf & wanted != 0
        return merged


def _has_zero_pages(pid: int) -> bool:
    """Whether ksmd replaced pages with the kernel's page of zeros (`use_zero_pages`, counted since Linux 6.6). If not,
    the process itself read there before it wrote, and there is nothing to undo."""
    try:
        return (
            re.search(r"^ksm_zero_pages:? [1-9]", Path(f"/proc/{pid}/ksm_stat").read_text(), re.MULTILINE) is not None
        )
    except OSError:
        return True


def unmerge(pid: int, merged: Merged, reserve: int, cancelled: Callable[[], bool] = lambda: False) -> Outcome:
    """Break all merged pages of a process, but leave `reserve` bytes to others. Its memory stays mergeable, and ksmd
    may merge it again meanwhile. Raises `TargetError`."""
    with meant(pid) as pidfd:
        return _unmerge(pid, pidfd, merged, reserve, True, cancelled)


def detach(pid: int, merged: Merged, reserve: int, cancelled: Callable[[], bool] = lambda: False) -> Outcome:
    """The same, but none of its memory is mergeable afterwards, nor what it maps from then on. Raises `TargetError`."""
    with meant(pid) as pidfd:
        outcome = _unmerge(pid, pidfd, merged, reserve, False, cancelled)
        if outcome.errno is None:
            release(pid, pidfd)
        return outcome


def _unmerge(pid: int, pidfd: int, merged: Merged, reserve: int, keep: bool, cancelled: Callable[[], bool]) -> Outcome:
    outcome, first, before = Outcome(pid), -1, 1 << 63
    for _ in range(PASSES if merged.exact or not keep else 1):
        ranges = merged.ranges(pid)
        if first < 0:
            first = sum(size for _, _, size in ranges) // PAGE_SIZE
        if not ranges and not keep:
            ranges = [(m.start, m.end, 0) for m in mappings(pid) if m.mergeable]
        remaining = sum(size for _, _, size in ranges)
        if not ranges or (keep and remaining >= before):  # ksmd merges as fast as it is undone
            return outcome
        before = remaining
        if error := _pass(pidfd, ranges, reserve, keep, cancelled, outcome):
            break
    else:
        error = 0 if keep else errno.EAGAIN
    outcome.errno = errno.errorcode.get(error)
    outcome.pages_remaining = sum(size for _, _, size in merged.ranges(pid)) // PAGE_SIZE
    # A part of the range in which it ended may be done.
    outcome.pages_unmerged = max(outcome.pages_unmerged, first - outcome.pages_remaining)
    outcome.bytes_needed = outcome.pages_remaining * PAGE_SIZE
    return outcome


def _pass(pidfd: int, ranges: Ranges, reserve: int, keep: bool, cancelled: Callable[[], bool], outcome: Outcome) -> int:
    """Go over `ranges` once. Returns 0 or an errno."""
    while ranges:
        if cancelled():
            return errno.EINTR
        check(outcome.pid)
        step = inject.unmerge(outcome.pid, pidfd, ranges, reserve, HOLD, keep)
        outcome.pages_unmerged += sum(size for _, _, size in ranges[: step.done]) // PAGE_SIZE
        outcome.bytes_available = max(0, step.available - OVERHEAD - reserve)
        outcome.limits_unseen = bool(step.unseen)
        done = step.done
        if step.error == errno.ENOMEM and step.available >= step.needed:
            done += 1  # the kernel's own: it was unmapped meanwhile, or will be seen again
        elif step.error and step.error != errno.EAGAIN:
            return int(step.error)
        ranges = ranges[done:]
        if ranges:
            time.sleep(REST)
    return 0
