"""Looking again and again, and recording what was seen.

A look costs as much as reading all memory, however little is kept of it. So looks are as far apart as the user asked,
or farther, so that neither CPU time nor bytes written exceed their budget (`Budget`)."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from samepage.arrays import Bools, Ints
from samepage.estimate.look import Look, MappingRows, SourceRows, look
from samepage.estimate.pages import zero_checksum
from samepage.estimate.process import Process
from samepage.estimate.selection import Selection
from samepage.estimate.source import Batch, Kind, Left, Opened, PageFlag, Source
from samepage.fleet import schema
from samepage.fleet.key import Key
from samepage.memory import PAGE_SIZE

DAY = 86400.0

FRACTION = 0.01
"""The share of contents to keep by default."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What recording may cost: a share of one core, and bytes a day."""

    core: float = 0.01
    daily: int = 64 << 20

    def pause(self, cpu: float, size: int) -> float:
        """How many seconds after the beginning of a look that cost this much the next may begin."""
        return max(cpu / self.core, size * DAY / self.daily)


@dataclass(slots=True)
class Spent:
    """What recording has cost so far."""

    looks: int = 0
    pages: int = 0
    """Read in all looks."""
    seconds: float = 0.0
    """From the beginning of the first look until the next may begin."""
    cpu_seconds: float = 0.0
    bytes_written: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def core(self) -> float:
        """The share of a core."""
        return self.cpu_seconds / self.seconds if self.seconds else 0.0

    @property
    def daily(self) -> int:
        """The bytes written, per day."""
        return round(self.bytes_written * DAY / self.seconds) if self.seconds else 0


class _WithSegments:
    """A process whose pages that samepage merged are read, too, one by one, as if nothing had been merged."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def __getattr__(self, name: str) -> Any:
        return getattr(self._process, name)

    def open(self) -> Opened:
        opened = self._process.open()
        starts = np.array([mapping.start // PAGE_SIZE for mapping in opened.mappings], np.int64)
        merged = np.array([mapping.kind is Kind.SEGMENT for mapping in opened.mappings], np.bool_)
        if merged.any():
            opened.batches = _unmerged(opened.batches, starts, merged)
        return opened


def _unmerged(batches: Iterator[Batch], starts: Ints, merged: Bools) -> Iterator[Batch]:
    for batch in batches:
        there = batch.flags & PageFlag.ELSEWHERE != 0
        there &= merged[np.searchsorted(starts, batch.vpns, "right") - 1]
        batch.flags[there] = PageFlag.FRAME | PageFlag.TAKEN
        yield batch


def record(
    select: Callable[[], Selection],
    directory: Path,
    key: Key,
    host: str,
    every: float,
    fraction: float = FRACTION,
    budget: Budget | None = None,
    told: Callable[[str], None] = lambda _: None,
) -> Iterator[Spent]:
    """Look at what `select` finds each time, and write the looks to `directory`. Yields after each look, and then waits
    for the next. Raises OSError if it cannot write."""
    budget = budget or Budget()
    spent = Spent()
    schema.forget_unfinished(directory, host)
    began = time.monotonic()
    while True:
        started, cpu = time.time_ns(), time.process_time()
        at = time.monotonic()
        selection = select()
        seen = look(_readable(selection.sources), selection.optional, fraction if fraction < 1 else None, True)
        for problem in seen.problems:
            if problem not in spent.problems:
                spent.problems.append(problem)
                told(problem)
        head = schema.Head(host, started // 1000, key.name, fraction)
        size = schema.write(directory, head, *tables(seen, head, key))
        spent.looks += 1
        spent.pages += seen.pages_read
        spent.bytes_written += size
        cpu = time.process_time() - cpu
        spent.cpu_seconds += cpu
        due = at + max(every, budget.pause(cpu, size))
        spent.seconds = due - began
        yield spent
        time.sleep(max(0.0, due - time.monotonic()))


def _readable(sources: list[Source]) -> list[Source]:
    return [_WithSegments(source) if isinstance(source, Process) else source for source in sources]


def tables(seen: Look, head: schema.Head, key: Key) -> tuple[Any, Any]:
    """A look as tables of mappings and of pages."""
    mappings = [(rows, part) for rows in seen.sources for part in rows.mappings]
    return _mappings_table(mappings, head), _pages_table(seen, [part for _, part in mappings], head, key)


def _mappings_table(mappings: list[tuple[SourceRows, MappingRows]], head: schema.Head) -> Any:
    host_bytes = os.sysconf("SC_PHYS_PAGES") * PAGE_SIZE
    who: dict[int, tuple[str, str]] = {}
    # What an agent has not taken of a process, it was told to leave.
    has_agent = {id(rows.source) for rows, part in mappings if part.mapping.name.endswith("/libsamepage.so")}
    rows = []
    for number, (source_rows, part) in enumerate(mappings):
        source, mapping = source_rows.source, part.mapping
        by_default = mapping.left is Left.LARGE_ONLY and id(source) not in has_agent
        if id(source) not in who:
            who[id(source)] = _who(source)
        service, image = who[id(source)]
        rows.append(
            {
                "host": head.host,
                "look": head.look,
                "mapping": number,
                "pid": -1 if source.pid is None else source.pid,
                "domain": -1 if source.uid is None else source.uid,
                "comm": source.name,
                "service": service,
                "image": image,
                "kind": str(mapping.kind),
                "library": mapping.name if mapping.kind is Kind.FILE else "",
                "taken": mapping.taken or by_default or mapping.kind is Kind.SEGMENT,
                "vpn": mapping.start // PAGE_SIZE,
                "end": -(-mapping.end // PAGE_SIZE),
                "pages": part.npages,
                "host_bytes": host_bytes,
                "fraction": head.fraction,
            }
        )
    return pa.Table.from_pylist(rows, schema.MAPPINGS)


def _pages_table(seen: Look, parts: list[MappingRows], head: schema.Head, key: Key) -> Any:
    rows, flags = seen.rows, seen.flags
    hashes = key.hashes(seen.checksum, zero_checksum())
    # The kernel's page of zeros has no checksum, for it is not read.
    hashes[flags & PageFlag.ELSEWHERE != 0] = 0
    mapping = np.searchsorted(np.array([part.first for part in parts], np.int64), np.arange(rows), "right") - 1
    frame = (flags & (PageFlag.FRAME | PageFlag.OUTSIDE | PageFlag.ELSEWHERE)) == PageFlag.FRAME
    forked = (flags & PageFlag.SHARED != 0) & (flags & (PageFlag.ELSEWHERE | PageFlag.KSM) == 0)
    vpn = _vpns(seen)
    first = np.ones(rows, np.bool_)
    first[1:] = np.diff(vpn) != 1
    for column in (hashes, mapping, frame, forked):
        first[1:] |= column[1:] != column[:-1]
    readable = flags & PageFlag.UNREADABLE == 0
    first[1:] |= readable[1:] != readable[:-1]
    at = np.flatnonzero(first)
    npages = np.diff(np.append(at, rows))
    kept = readable[at]
    at, npages = at[kept], npages[kept]
    columns = {
        "host": pa.DictionaryArray.from_arrays(np.zeros(len(at), np.int32), [head.host]),
        "look": np.full(len(at), head.look),
        "mapping": mapping[at].astype(np.int32),
        "vpn": vpn[at],
        "npages": npages.astype(np.int32),
        "hash": hashes[at].view(np.int64),
        "frame": frame[at],
        "forked": forked[at],
    }
    return pa.table({name: pa.array(values) for name, values in columns.items()}, schema.PAGES)


def _vpns(seen: Look) -> Ints:
    """The page number of every row."""
    assert seen.start_vpns is not None
    starts = seen.starts.astype(np.int64)
    lengths = np.diff(np.append(starts, seen.rows))
    vpns: Ints = np.arange(seen.rows) + np.repeat(seen.start_vpns - starts, lengths)
    return vpns


def _who(source: Source) -> tuple[str, str]:
    """The service and the program of a source."""
    if source.pid is None:
        return source.name, source.name
    try:
        image = os.readlink(f"/proc/{source.pid}/exe")
    except OSError:
        image = source.name
    try:
        cgroups = Path(f"/proc/{source.pid}/cgroup").read_text()
    except OSError:
        cgroups = ""
    return service_of(cgroups) or source.name, image


def service_of(cgroups: str) -> str:
    """The systemd unit in /proc/PID/cgroup without its instance, so that it is the same on all hosts; "" if there is
    none."""
    units: list[str] = re.findall(r"/([^/\n]+\.service)", cgroups)
    # A user's manager is a service, and so is what it starts.
    return re.sub(r"@[^@]*(\.service)$", r"@\1", units[-1]) if units else ""
