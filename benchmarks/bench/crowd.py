"""What merging costs with memory in very many pieces, with very many children, and with processes that come and go."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.bench import meters, sides
from benchmarks.bench.growth import PATIENCE, merging_cpu
from benchmarks.bench.measures import MIB, NEARLY_ALL, Bench, Record, Skipped, compiled
from benchmarks.bench.process import PAGE_SIZE
from benchmarks.bench.sides import Side
from benchmarks.processes import Commanded, wait_until

REPEATS = 3
"""At most: the largest sizes take minutes."""

MAX_MAP_COUNT = Path("/proc/sys/vm/max_map_count")

AT_ONCE = 8
"""Children by which the cost of one is measured, first and last."""

EVERY, LIFETIME = 0.03, 0.5
"""Seconds from one short-lived process to the next (2,000 a minute), and from when it is ready to its end."""


# ---- areas -----------------------------------------------------------------------------------------------------------


def areas(bench: Bench) -> Iterator[Record]:
    """Two processes with the same pages, each of which is an area of its own: no neighbour of it may be merged."""
    with tempfile.TemporaryDirectory(prefix="samepage-bench-") as folder, contextlib.ExitStack() as stack:
        program = compiled("crowd.c", Path(folder) / "crowd")
        for count in bench.sizes.areas:
            if not _may_have(8 * count, stack):
                bench.skip(f"{count:,} areas", f"needs root, to raise {MAX_MAP_COUNT}")
                continue
            for repeat in range(min(bench.repeats, REPEATS)):
                for make in bench.both():
                    side = make()
                    with sides.switches(bench.say), side:
                        side.start_programs([[program, "areas", str(count)]] * 2)
                        seconds, cpu = _until(side, side.saved, NEARLY_ALL * count * PAGE_SIZE)
                    bench.say(f"areas, {side.name}, {count:,} each: {cpu:.2f} s of CPU")
                    record: Record = {"experiment": "areas", "side": side.name, "repeat": repeat, "size": count}
                    yield record | {"seconds": seconds, "cpu_us": 1e6 * cpu / (2 * count)}


def _may_have(mappings: int, stack: contextlib.ExitStack) -> bool:
    """Whether a process may have so many mappings; for root it may, until `stack` is closed."""
    before = MAX_MAP_COUNT.read_text()
    if int(before) < mappings:
        with contextlib.suppress(PermissionError):
            MAX_MAP_COUNT.write_text(str(mappings))
            stack.callback(MAX_MAP_COUNT.write_text, before)
    return int(MAX_MAP_COUNT.read_text()) >= mappings


def _until(
    side: Side, done: Callable[[], int], goal: float, begin: Callable[[], object] = lambda: None
) -> tuple[float, float]:
    """Merge until something is as large as that, while `begin` goes on and afterwards; seconds of time, and of CPU."""
    cpu, started = merging_cpu(side), time.monotonic()
    side.run(1)
    begin()
    wait_until(lambda: done() >= goal, "merged", PATIENCE, 0.05)
    return time.monotonic() - started, merging_cpu(side) - cpu


# ---- forks -----------------------------------------------------------------------------------------------------------


def forks(bench: Bench) -> Iterator[Record]:
    """A process whose pages are merged with another's, every second one by itself, forks workers: what the first cost
    until it is known that they share these pages, and the last. The other pages are shared by fork."""
    extents, children = bench.sizes.extents, bench.sizes.children
    with tempfile.TemporaryDirectory(prefix="samepage-bench-") as folder, contextlib.ExitStack() as stack:
        if not _may_have(8 * extents, stack):
            raise Skipped(f"needs root, to raise {MAX_MAP_COUNT}")
        program = compiled("crowd.c", Path(folder) / "crowd")
        for repeat in range(min(bench.repeats, REPEATS)):
            for make in bench.both():
                side = make()
                with sides.switches(bench.say), side:
                    parent, _ = side.start_programs([[program, "forks", str(extents)]] * 2)
                    sharing = NEARLY_ALL * 2 * extents
                    _until(side, side.pages_merged, sharing)
                    for name, count in ("first", AT_ONCE), ("rest", children - 2 * AT_ONCE), ("last", AT_ONCE):
                        sharing += NEARLY_ALL * count * extents
                        seconds, cpu = _until(side, side.pages_merged, sharing, partial(parent.ask, count))
                        cost = 1e6 * cpu / (count * extents)
                        bench.say(f"forks, {side.name}, {name} {count} children: {cost:.2f} µs of CPU for each page")
                        record: Record = {"experiment": "forks", "side": side.name, "repeat": repeat, "which": name}
                        yield record | {"extents": extents, "seconds": seconds, "children": count, "cpu_us": cost}


# ---- processes that come and go --------------------------------------------------------------------------------------


def comings(bench: Bench) -> Iterator[Record]:
    """2,000 processes a minute, each with 1 MiB that others have, too, beside so many that stay."""
    with tempfile.TemporaryDirectory(prefix="samepage-bench-") as folder:
        command = [compiled("copies.c", Path(folder) / "copies"), "1"]
        for staying in bench.sizes.staying:
            for repeat in range(min(bench.repeats, REPEATS)):
                for make in bench.both():
                    side = make()
                    with sides.switches(bench.say), side:
                        side.start_programs([command] * staying)
                        _until(side, side.saved, NEARLY_ALL * (staying - 1) * MIB)
                        merging = merging_cpu(side)
                        count, own = _come_and_go(command, side.socket, bench.sizes.coming_seconds)
                        merging = merging_cpu(side) - merging
                    bare = _come_and_go(command, None, bench.sizes.coming_seconds)[1]
                    cost = 1e3 * (own - bare + merging / count)
                    bench.say(f"comings, {side.name}, beside {staying}: {cost:.2f} ms of CPU for each process")
                    record: Record = {"experiment": "comings", "side": side.name, "repeat": repeat, "size": staying}
                    yield record | {"processes": count, "cpu_ms": cost, "merging_cpu_seconds": merging, "own": own}


def _come_and_go(command: list[str], socket: str | None, seconds: float) -> tuple[int, float]:
    """How many came and went, and the seconds of CPU that one of them took itself."""
    there: deque[tuple[float, Commanded]] = deque()
    count, started, cpu = 0, time.monotonic(), meters.waited_for()
    while count * EVERY < seconds or there:
        now = time.monotonic()
        if count * EVERY < seconds and now >= started + count * EVERY:
            there.append((now + LIFETIME, Commanded(command, None, socket)))
            count += 1
        elif there and now >= there[0][0]:
            there.popleft()[1].leave()
        else:
            time.sleep(0.002)
    return count, (meters.waited_for() - cpu) / count


EXPERIMENTS: dict[str, Callable[[Bench], Iterator[Record]]] = {"areas": areas, "forks": forks, "comings": comings}
