"""What is saved for the CPU that is spent, where a tenth of memory is equal and the rest changes all the time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from benchmarks.bench import meters, sides
from benchmarks.bench.measures import APART, OTHER, Bench, Record, memory_worker, pages_of
from benchmarks.bench.process import PAGE_SIZE, Run
from benchmarks.bench.sides import Side
from benchmarks.memory_cgroup import MemoryCgroup

RUN_PAGES = 256
"""Equal pages in a row (1 MiB), between nine times as many that change: half of a huge page, and of a block that
smart_scan skips."""

EVERY = 1.0
"""Seconds from one new content of a changing page to the next."""

REPEATS = 3
"""At most: each is a minute, for each side."""


def mixed(bench: Bench) -> Iterator[Record]:
    """Two processes, for a minute from when merging is allowed."""
    parts = max(1, pages_of(bench.sizes.mixed) // (10 * RUN_PAGES))
    commands = [memory_worker(_runs(parts, number)) for number in range(2)]
    for repeat in range(min(bench.repeats, REPEATS)):
        makers = bench.both()
        if bench.kernel():
            makers += [sides.fastest_unskipping, *([] if repeat else [sides.defaults])]
        for make in makers:
            side = make()
            with sides.switches(bench.say), bench.group() as group, side:
                record = _watch(side, group, commands, bench.sizes.mixed_seconds, parts * RUN_PAGES)
            bench.say(
                f"mixed, {side.name}: {record['saved'][-1] >> 20} MiB saved, {record['cpu_seconds'][-1]:.2f} s of CPU"
            )
            goal = parts * RUN_PAGES * PAGE_SIZE
            yield {"experiment": "mixed", "side": side.name, "repeat": repeat, "goal": goal, **record}


def _runs(parts: int, process: int) -> list[Run]:
    runs: list[Run] = []
    for part in range(parts):
        runs.append((part * RUN_PAGES, RUN_PAGES, 0))
        runs.append((OTHER + process * APART + 9 * part * RUN_PAGES, 9 * RUN_PAGES, 0))
    return runs


def _watch(side: Side, group: MemoryCgroup | None, commands: list[list[str]], seconds: float, common: int) -> Record:
    """Seconds since merging was allowed; bytes saved and CPU seconds spent by then. (Not until all is saved: what is
    spent afterwards counts, too.)"""
    for worker in side.start(commands, group, NUMPY_MADVISE_HUGEPAGE="0"):
        worker.ask("rewrite_others", common, EVERY)
    side.register()
    memory = meters.Memory(group, side.pids())
    record: Record = {"seconds": [0.0], "saved": [0], "cpu_seconds": [0.0]}
    before, cpu, started = memory.used(), side.cpu_seconds(), time.perf_counter()
    side.run(1)
    while record["seconds"][-1] < seconds:
        time.sleep(0.1)
        record["saved"].append(before - memory.used())
        record["cpu_seconds"].append(side.cpu_seconds() - cpu)
        record["seconds"].append(time.perf_counter() - started)
    return record


EXPERIMENTS: dict[str, Callable[[Bench], Iterator[Record]]] = {"mixed": mixed}
