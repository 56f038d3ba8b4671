"""What merging a page costs as there are more processes with it, and more pages in a process."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.bench import meters, sides
from benchmarks.bench.measures import MIB, NEARLY_ALL, Bench, Record, compiled
from benchmarks.bench.process import PAGE_SIZE
from benchmarks.bench.sides import Samepage, Side
from benchmarks.processes import wait_until

UNMERGED = 1 << 30
"""Bytes of memory that is not merged yet, about: the next processes come when those before them are merged."""

SHARE = 0.8
"""Of the memory that there is, what processes may take before they are merged."""

LARGE, REPEATS = 8192, 3
"""So many MiB in all take minutes: they are measured less often."""

PATIENCE = 300.0
"""Seconds for what came last to be merged."""


def growth(bench: Bench) -> Iterator[Record]:
    """More and more processes with the same memory; and two, with more and more memory."""
    with tempfile.TemporaryDirectory(prefix="samepage-bench-") as folder:
        program = compiled("copies.c", Path(folder) / "copies")
        sizes = [(count, bench.sizes.copy) for count in bench.sizes.copies]
        for count, mib in [*sizes, *((2, mib) for mib in bench.sizes.large)]:
            at_once = max(2, UNMERGED // (mib * MIB))
            if at_once * mib * MIB > SHARE * meters.available():
                bench.skip(f"two processes of {mib} MiB", "there is not enough memory")
                continue
            for repeat in range(min(bench.repeats, REPEATS) if count * mib >= LARGE else bench.repeats):
                for make in bench.both():
                    side = make()
                    with sides.switches(bench.say), side:
                        cost = 1e6 * _merge_all(side, [program, str(mib)], count, at_once, mib * MIB)
                    cost /= count * mib * MIB // PAGE_SIZE
                    bench.say(f"growth, {side.name}, {count} processes of {mib} MiB: {cost:.2f} µs of CPU a page")
                    record: Record = {"experiment": "growth", "side": side.name, "repeat": repeat}
                    yield record | {"processes": count, "mib": mib, "cpu_us": cost}


def _merge_all(side: Side, command: list[str], count: int, at_once: int, size: int) -> float:
    """Seconds of CPU for having all of it merged."""
    before = merging_cpu(side)
    for first in range(0, count, at_once):
        side.start_programs([command] * min(at_once, count - first))
        side.run(1)
        goal = NEARLY_ALL * (len(side.workers) - 1) * size
        wait_until(lambda: side.saved() >= goal, "merged", PATIENCE, 0.05)  # noqa: B023
    return merging_cpu(side) - before


def merging_cpu(side: Side) -> float:
    """Spent by all that merges: workers come while it works, and fork, so an agent counts from its start."""
    if not isinstance(side, Samepage):
        return side.cpu_seconds()
    pids = side.pids()
    agents = meters.AgentCpu(pids + meters.children(pids))
    try:
        return meters.process_cpu(side.pid) + agents.seconds()
    finally:
        agents.close()


EXPERIMENTS: dict[str, Callable[[Bench], Iterator[Record]]] = {"growth": growth}
