"""One look at many sources: every page read once, hashed, and remembered as a row of three columns.

A row is a checksum (u64), a `PageFlag` (u8) and, later, a class (u8). Rows are in the order of sources, and in each in
the order of addresses; so a source, or a mapping, is a range of rows, and neighbours in memory are neighbours here.
Threads read and hash, a batch each; the results are recorded here, in order.

A frame that is mapped more than once is read once. What every page of it needs is a *slot*: the checksum of the frame,
how often it was met, and how often it is mapped in all.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from samepage.agent import MIN_ALLOC
from samepage.arrays import Bools, Ints
from samepage.estimate import pages
from samepage.estimate.blocks import HeapPages, is_heap, moved
from samepage.estimate.sample import Column, Sampler, threshold
from samepage.estimate.source import (
    Batch,
    Denied,
    Kind,
    Left,
    Mapping,
    NoMemory,
    Opened,
    PageFlag,
    ScanError,
    Source,
    label,
)
from samepage.memory import PAGE_SIZE, U8, U32, U64

Progress = Callable[[int, str], None]
"""Called with the number of pages looked at since the last call, and the name of their process."""

HEADER = struct.Struct("<QQ")
"""Of a chunk of malloc's: the size of the one before, and its own with the flags."""


@dataclass(slots=True)
class MappingRows:
    """A mapping, or a part of one, and the rows that are its pages."""

    mapping: Mapping
    first: int
    npages: int = 0
    """Pages seen; of a sample, more than there are rows."""


@dataclass(slots=True)
class SourceRows:
    """What was seen of a source: its rows, from `first` to `end`, and those of its mappings."""

    source: Source
    first: int
    end: int
    mappings: list[MappingRows] = field(default_factory=list)
    npages: int = 0
    swapped: int = 0
    unreadable: int = 0
    map_count: int | None = None
    read: int = 0
    """Pages read."""


class Frames:
    """Slots of the frames that are mapped more than once, by page frame number."""

    def __init__(self) -> None:
        self._by_pfn = _sparse(_highest_frame())  # slot + 1
        self._count = 0
        self.checksum: U64 = np.zeros(1024, np.uint64)
        self.met: U32 = np.zeros(1024, np.uint32)
        self.mapcount: U32 = np.zeros(1024, np.uint32)

    def enter(self, pfns: U64, mapcounts: U64) -> tuple[Ints, Bools]:
        """The slot of each frame, and whether it is met here for the first time."""
        if not len(pfns):
            return np.empty(0, np.int64), np.empty(0, np.bool_)
        top = int(pfns.max()) + 1
        if top > len(self._by_pfn):  # memory was added meanwhile
            self._by_pfn = np.append(self._by_pfn, np.zeros(top - len(self._by_pfn), np.uint32))
        unique, first, inverse = np.unique(pfns, return_index=True, return_inverse=True)
        slot = self._by_pfn[unique].astype(np.int64) - 1
        new = slot < 0
        slot[new] = self._count + np.arange(np.count_nonzero(new))
        self._count += int(np.count_nonzero(new))
        while self._count > len(self.met):
            for name in ("checksum", "met", "mapcount"):
                column = getattr(self, name)
                setattr(self, name, np.concatenate([column, np.zeros_like(column)]))
        self._by_pfn[unique[new]] = slot[new] + 1
        self.mapcount[slot[new]] = mapcounts[first[new]]
        self.met[slot] += np.bincount(inverse, minlength=len(unique)).astype(np.uint32)
        is_first = np.zeros(len(pfns), np.bool_)
        is_first[first[new]] = True
        return slot[inverse], is_first

    def outside(self, slots: Ints) -> Bools:
        """Which of these frames are mapped by processes that were not looked at."""
        return self.met[slots] < self.mapcount[slots]


def _sparse(length: int) -> U32:
    """Zeros that take memory only where they are written: numpy's own arrays are made of huge pages."""
    memory = mmap.mmap(-1, max(length, 1) * 4, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.uint32)


def _highest_frame() -> int:
    """How many page frames there may be, /proc/zoneinfo says; 0 when it does not."""
    try:
        zones = Path("/proc/zoneinfo").read_text()
    except OSError:
        return 0
    spans = re.findall(r"spanned +(\d+)(?:(?!spanned).)*?start_pfn: +(\d+)", zones, re.DOTALL)
    return max((int(spanned) + int(start) for spanned, start in spans), default=0)


@dataclass(slots=True)
class Blocks:
    """`blocks.Moved` of all sources: how many; the rows of their pages now; and of the pages that they would have at
    the start of pages, the checksums and the numbers of their sources."""

    count: int
    rows: U32
    moved: U64
    moved_sources: U32


@dataclass(slots=True)
class Look:
    """Everything that one look saw. There is one row a page, unless it is a sample. `starts` are the rows at which a
    run of pages starts that follow each other in memory, and `start_vpns`, when asked for, their page numbers. `scale`
    is how many pages a row stands for: 1 unless `sample` says otherwise.
    """

    sources: list[SourceRows]
    checksum: U64
    flags: U8
    starts: U32
    start_vpns: Ints | None
    frames_known: bool
    scale: float
    previous: U64 | None
    """Of a sample: the checksum of the page before each row's, 0 where there is none."""
    every: U64 | None
    """Of a sample: what the `Sampler` kept besides."""
    problems: list[str]
    seconds: float
    cpu_seconds: float
    pages_read: int
    blocks: Blocks = field(
        default_factory=lambda: Blocks(0, *map(np.empty, (0, 0, 0), (np.uint32, np.uint64, np.uint32)))
    )

    @property
    def rows(self) -> int:
        return len(self.checksum)

    def source_of(self, rows: Ints) -> Ints:
        """The number of the source of each row."""
        return np.searchsorted(np.array([s.end for s in self.sources], np.int64), rows, "right")


@dataclass(slots=True)
class _Work:
    """A batch on its way: being read, or waiting for those before it."""

    rows: SourceRows
    opened: Opened
    batch: Batch
    wanted: Ints
    slots: Ints
    sums: U64
    states: U8
    reading: Future[int] | None
    last: bool = False


class _Looker:
    def __init__(self, sample: float | None, keep_vpns: bool, progress: Progress) -> None:
        self.sample = None if sample is None else Sampler(sample)
        self._progress = progress
        self._frames = Frames()
        self.problems: list[str] = []
        self.sources: list[SourceRows] = []
        self.checksum, self.flags = Column(np.uint64), Column(np.uint8)
        self.starts, self.shared_slots = Column(np.uint32), Column(np.uint32)
        self.start_vpns = Column(np.int64) if keep_vpns else None
        self.previous = Column(np.uint64)
        self._rows = 0
        self._after: tuple[SourceRows, int] | None = None  # where a run of pages would go on
        self._block: Mapping | None = None  # the large allocation that the last page was in
        self._heaps: dict[Mapping, list[HeapPages]] = {}  # of the source that is being put down
        self._nblocks = 0
        self._block_rows, self._moved, self._moved_sources = Column(np.uint32), Column(np.uint64), Column(np.uint32)
        self.frames_known = True
        self._denied = 0

    # -- reading -------------------------------------------------------------------------------------------

    def run(self, sources: Iterable[Source], optional: set[int]) -> None:
        workers = len(os.sched_getaffinity(0))
        waiting: deque[_Work] = deque()
        with ThreadPoolExecutor(workers) as pool:
            try:
                for source in sources:
                    for work in self._begin(source, optional, pool):
                        waiting.append(work)
                        while len(waiting) > 2 * workers:
                            self._commit(waiting.popleft())
                while waiting:
                    self._commit(waiting.popleft())
            finally:
                for work in waiting:
                    if work.reading:
                        work.reading.cancel()
        if self._denied:
            others = "1 process was" if self._denied == 1 else f"{self._denied} processes were"
            hint = "" if os.geteuid() == 0 else "; run as root to look at other users' memory"
            self.problems.append(f"{others} left out: permission denied{hint}")
        # Only now is known what was met of each frame.
        if self.frames_known:
            slots = self.shared_slots.values.astype(np.int64)
            at = np.flatnonzero(_has_slot(self.flags.values))
            self.flags.values[at[self._frames.outside(slots)]] |= PageFlag.OUTSIDE

    def _begin(self, source: Source, optional: set[int], pool: ThreadPoolExecutor) -> Iterator[_Work]:
        try:
            opened = source.open()
        except ScanError as e:
            if source.pid not in optional or not isinstance(e, NoMemory | Denied):
                self.problems.append(str(e))
            elif isinstance(e, Denied):
                self._denied += 1
            return
        rows = SourceRows(source, 0, 0, map_count=opened.map_count)
        for batch in opened.batches:
            if len(batch.vpns):
                yield self._start(rows, opened, batch, pool)
        nothing = Batch(np.empty(0, np.int64), np.empty(0, np.uint8))
        yield _Work(
            rows, opened, nothing, nothing.vpns, nothing.vpns, np.empty(0, np.uint64), nothing.flags, None, True
        )

    def _start(self, rows: SourceRows, opened: Opened, batch: Batch, pool: ThreadPoolExecutor) -> _Work:
        """Enter its frames, and have those read that were not met before."""
        flags = batch.flags
        slots = np.empty(0, np.int64)
        read = flags & PageFlag.ELSEWHERE == 0
        if batch.frames is not None and batch.mapcounts is not None:
            slots, first = self._frames.enter(batch.frames, batch.mapcounts)
            at = np.flatnonzero(_has_slot(flags))
            flags[at[first]] |= PageFlag.FRAME
            read[at[~first]] = False
        elif rows.source.pid is not None:
            self.frames_known = False
        wanted = np.flatnonzero(read)
        sums, states = np.empty(len(wanted), np.uint64), np.empty(len(wanted), np.uint8)
        runs = pages.runs(batch.vpns[wanted], batch.shift)
        reading = pool.submit(pages.hash_runs, opened.fd, runs, sums, states)
        return _Work(rows, opened, batch, wanted, slots, sums, states, reading)

    # -- putting down --------------------------------------------------------------------------------------

    def _commit(self, work: _Work) -> None:
        rows = work.rows
        if rows.npages == 0 and not rows.mappings:
            rows.first = rows.end = self._rows
        if work.last:
            self._end(work)
            return
        assert work.reading is not None
        rows.read += work.reading.result()
        sums, flags = np.zeros(len(work.batch.vpns), np.uint64), work.batch.flags
        sums[work.wanted] = work.sums
        flags[work.wanted[work.states == 0]] |= PageFlag.UNREADABLE
        if len(work.slots):
            at = np.flatnonzero(_has_slot(flags))
            first = flags[at] & PageFlag.FRAME != 0
            self._frames.checksum[work.slots[first]] = sums[at[first]]
            sums[at] = self._frames.checksum[work.slots]
            flags[at[sums[at] == 0]] |= PageFlag.UNREADABLE
        rows.npages += len(sums)
        rows.unreadable += int(np.count_nonzero(flags & PageFlag.UNREADABLE))
        bounds = self._bounds(work)
        self._keep(work, sums, flags, bounds)
        self._progress(len(sums), label(rows.source))

    def _end(self, work: _Work) -> None:
        rows, opened = work.rows, work.opened
        remains = rows.npages > rows.unreadable or not opened.gone
        for heap in self._heaps.values() if remains else ():
            self._move(opened.fd, heap)
        self._heaps = {}
        for fd in (opened.fd, *opened.more):
            os.close(fd)
        rows.swapped = opened.swapped
        self.problems += opened.remarks
        if opened.gone or not rows.source.alive():
            what = "became another program" if rows.source.alive() else "ended"
            read = rows.npages - rows.unreadable
            kept = f"the {read} pages read before are kept" if read else "nothing was read"
            self.problems.append(
                f"process {rows.source.pid} ({rows.source.name}): {what} while it was looked at; {kept}"
            )
        elif rows.unreadable > (0 if rows.source.pid is None else rows.npages // 2):
            # Of a process that runs, some always go away before they are read.
            self.problems.append(f"{label(rows.source)}: {rows.unreadable} of {rows.npages} pages could not be read")
        if remains:
            self.sources.append(rows)

    def _move(self, fd: int, parts: list[HeapPages]) -> None:
        """Put down what the blocks of a heap would be elsewhere."""
        vpns, alone, rows = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("vpns", "alone", "rows")
        )
        found = moved(fd, HeapPages(vpns, alone, rows, parts[0].end))
        if self.sample is not None:
            found.checksum = found.checksum[found.checksum < threshold(self.sample.share)]
        self._nblocks += found.count
        self._block_rows.extend(found.rows)
        self._moved.extend(found.checksum)
        self._moved_sources.extend(np.full(len(found.checksum), len(self.sources)))

    @property
    def blocks(self) -> Blocks:
        """What is put down of them."""
        return Blocks(self._nblocks, self._block_rows.values, self._moved.values, self._moved_sources.values)

    def _bounds(self, work: _Work) -> list[tuple[int, Mapping]]:
        """Where in the batch a mapping, or a large allocation in one, starts: (position, which it is)."""
        vpns, mappings = work.batch.vpns, work.opened.mappings
        which = np.searchsorted(np.array([m.start // PAGE_SIZE for m in mappings]), vpns, "right") - 1
        blocks = self._blocks(work, which)
        edges = np.array([(b.start // PAGE_SIZE, b.end // PAGE_SIZE) for b in blocks], np.int64).reshape(-1, 2)
        places = np.searchsorted(vpns, edges)
        for block, (start, end) in zip(blocks, places.tolist(), strict=True):
            if block.taken:
                work.batch.flags[start:end] |= PageFlag.TAKEN
        cuts = np.unique(np.concatenate([np.flatnonzero(np.diff(which, prepend=-1)), places.ravel()]))
        cuts = cuts[cuts < len(vpns)]
        within_block = np.searchsorted(edges[:, 0], vpns[cuts], "right") - 1
        within = (within_block >= 0) & (vpns[cuts] < np.append(edges[:, 1], 0)[within_block])
        return [
            (at, blocks[b] if inside else mappings[m])
            for at, b, inside, m in zip(cuts.tolist(), within_block, within, which[cuts], strict=True)
        ]

    def _blocks(self, work: _Work, which: Ints) -> list[Mapping]:
        """Large allocations with pages in the batch, ascending: one that came in from before, and those that start."""
        vpns, mappings = work.batch.vpns, work.opened.mappings
        block = self._block if self._after and self._after[0] is work.rows else None
        blocks = [block] if block else []
        for at in work.wanted[np.flatnonzero(work.states & pages.PAGE_CHUNK)].tolist():
            address, whole = int(vpns[at]) * PAGE_SIZE, mappings[which[at]]
            if whole.kind is not Kind.ANONYMOUS or (block and address < block.end):
                continue
            size = _chunk_size(work.opened.fd, address + work.batch.shift)
            if size - HEADER.size >= MIN_ALLOC and address + size <= whole.stretch:
                left = Left.STATIC if whole.left is Left.STATIC else None
                block = Mapping(address, address + size, Kind.ALLOCATION, "", taken=left is None, left=left)
                blocks.append(block)
        self._block = block
        return blocks

    def _keep(self, work: _Work, sums: U64, flags: U8, bounds: list[tuple[int, Mapping]]) -> None:
        """Append the pages, or of a sample those that belong to it."""
        rows, vpns = work.rows, work.batch.vpns
        goes_on = np.zeros(len(vpns), np.bool_)
        goes_on[1:] = np.diff(vpns) == 1
        goes_on[0] = self._after is not None and self._after[0] is rows and vpns[0] == self._after[1]
        self._after = (rows, int(vpns[-1]) + 1)
        kept = np.ones(len(vpns), np.bool_)
        if self.sample is not None:
            kept = self.sample.keep(sums, flags)
            before = np.zeros_like(sums)
            before[1:] = np.where(goes_on[1:], sums[:-1], 0)
            self.previous.extend(before[kept])
            goes_on[:] = False  # of a sample every row is a run
        goes_on[[at for at, _ in bounds if at]] = False
        row = self._rows + np.cumsum(kept) - kept
        ends = [at for at, _ in bounds[1:]] + [len(vpns)]
        for (at, mapping), end in zip(bounds, ends, strict=True):
            if not rows.mappings or rows.mappings[-1].mapping is not mapping:
                rows.mappings.append(MappingRows(mapping, int(row[at])))
            rows.mappings[-1].npages += end - at
            if is_heap(mapping):
                alone = flags[at:end] & (PageFlag.SHARED | PageFlag.KSM | PageFlag.ELSEWHERE) == 0
                part = HeapPages(vpns[at:end], alone, np.where(kept, row, -1)[at:end], mapping.end)
                self._heaps.setdefault(mapping, []).append(part)
        if len(work.slots):
            self.shared_slots.extend(work.slots[kept[_has_slot(flags)]])
        starts = np.flatnonzero(kept & ~goes_on)
        self.starts.extend(row[starts])
        if self.start_vpns is not None:
            self.start_vpns.extend(vpns[starts])
        self.checksum.extend(sums[kept])
        self.flags.extend(flags[kept])
        self._rows = rows.end = self._rows + int(np.count_nonzero(kept))


def _has_slot(flags: U8) -> Bools:
    out: Bools = (flags & (PageFlag.SHARED | PageFlag.KSM) != 0) & (flags & PageFlag.ELSEWHERE == 0)
    return out


def _chunk_size(fd: int, offset: int) -> int:
    """Bytes of the chunk of malloc's that starts there; 0 when it is gone."""
    try:
        head = os.pread(fd, HEADER.size, offset)
    except OSError:
        return 0
    return 0 if len(head) < HEADER.size else int(HEADER.unpack(head)[1]) & ~7


def look(
    sources: Iterable[Source],
    optional: set[int] = frozenset(),  # type: ignore[assignment]
    sample: float | None = None,
    keep_vpns: bool = False,
    progress: Progress = lambda *_: None,
) -> Look:
    """Look at every source. `problems` says what could not be looked at; of `optional` processes it says only how many
    could not be. `sample` keeps that share of the pages, by their content. `keep_vpns` for `watch`."""
    began, cpu = time.monotonic(), time.process_time()
    looker = _Looker(sample, keep_vpns, progress)
    looker.run(sources, optional)
    return Look(
        sources=looker.sources,
        checksum=looker.checksum.values,
        flags=looker.flags.values,
        starts=looker.starts.values,
        start_vpns=None if looker.start_vpns is None else looker.start_vpns.values,
        frames_known=looker.frames_known,
        scale=1 / sample if sample is not None else 1.0,
        previous=looker.previous.values if sample is not None else None,
        every=None if looker.sample is None else looker.sample.every,
        problems=looker.problems,
        seconds=time.monotonic() - began,
        cpu_seconds=time.process_time() - cpu,
        pages_read=sum(rows.read for rows in looker.sources),
        blocks=looker.blocks,
    )
