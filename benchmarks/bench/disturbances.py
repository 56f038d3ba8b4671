"""What is noticed of merging while it goes on: by a thread that writes, by whoever looks from outside, by a guest."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.bench import meters, sides
from benchmarks.bench.measures import Bench, Record, Skipped, compiled, memory_worker, pages_of
from benchmarks.bench.process import PAGE_SIZE
from benchmarks.bench.sides import Side
from benchmarks.processes import wait_until


def stall(bench: Bench) -> Iterator[Record]:
    """How long a write takes while its page is being merged. The writer has a CPU of its own, all that merges the
    others. What is merged is unmerged and merged again until there is enough to see."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        raise Skipped("needs a CPU for the writer alone, and another")
    if os.geteuid() != 0:
        bench.skip("priority for the writer", "needs root; others run on its CPU as they please")
    npages = pages_of(bench.sizes.stall)
    commands, goal = [memory_worker([(0, npages, 0)])] * 2, npages * PAGE_SIZE
    with tempfile.TemporaryDirectory(prefix="samepage-bench-") as folder:
        library = compiled("writer.c", Path(folder) / "writer.so", "-shared", "-fPIC")
        for repeat in range(bench.repeats):
            for make in (Side, *bench.both()):
                side = make()
                with sides.switches(bench.say), bench.group() as group, side:
                    worker, _ = side.start(commands, group, NUMPY_MADVISE_HUGEPAGE="0")
                    side.register()
                    with kept_to(set(cpus[:-1]), [0, *side.busy()]):
                        worker.ask("writer_start", library, cpus[-1])
                        time.sleep(0.2)
                        merging = merge_again(
                            bench, side, meters.Memory(group, side.pids()), goal, partial(worker.ask, "writer_record")
                        )
                        record = worker.ask("writer_stop")
                bench.say(
                    f"stalls, {side.name}, {repeat + 1} of {bench.repeats}: longest {record['longest_us']:.0f} µs"
                )
                yield {"experiment": "stall", "side": side.name, "repeat": repeat, "seconds": merging, **record}


def merge_again(
    bench: Bench, side: Side, memory: meters.Memory, goal: int, record: Callable[[bool], Any] = lambda _: None
) -> float:
    """Merge again and again, and call `record` when that begins and ends; returns the seconds it was."""
    merging, ends = 0.0, time.monotonic() + bench.sizes.limit
    while merging < bench.sizes.merging and time.monotonic() < ends:
        before = memory.used()
        side.run(1)
        record(True)
        started = time.perf_counter()
        if type(side) is Side:
            time.sleep(bench.sizes.merging)
        else:
            # What somebody writes to meanwhile is not merged any more, so not all will be.
            with contextlib.suppress(TimeoutError):
                wait_until(lambda: before - memory.used() >= 0.75 * goal, "merged", 5, memory.every)  # noqa: B023
        merging += time.perf_counter() - started
        record(False)
        side.run(2)
        side.run(0)
    return merging


@contextlib.contextmanager
def kept_to(cpus: set[int], ids: list[int]) -> Iterator[None]:
    """Keep processes and threads (0: this one) to some CPUs; those that are there at the end get back what they had."""
    before: dict[int, set[int]] = {}
    try:
        for i in ids:
            with contextlib.suppress(ProcessLookupError):  # a thread that answered a question is soon gone
                before[i] = os.sched_getaffinity(i)
                os.sched_setaffinity(i, cpus)
        yield
    finally:
        for i, had in before.items():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(i, had)


def holes(bench: Bench) -> Iterator[Record]:
    """How many pages are in no place at once, and for how long, as /proc/PID/pagemap shows. What is merged is unmerged
    and merged again until there is enough to see."""
    npages = pages_of(bench.sizes.stall)
    commands, goal = [memory_worker([(0, npages, 0)])] * 2, npages * PAGE_SIZE
    with tempfile.TemporaryDirectory(prefix="samepage-bench-") as folder:
        watcher = compiled("holes.c", Path(folder) / "holes")
        for repeat in range(bench.repeats):
            for make in bench.both():
                side = make()
                with sides.switches(bench.say), bench.group() as group, side:
                    worker, _ = side.start(commands, group, NUMPY_MADVISE_HUGEPAGE="0")
                    side.register()
                    command = [watcher, str(worker.pid), str(worker.ask("address")), str(npages)]
                    with subprocess.Popen(
                        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                    ) as watching:
                        merging = merge_again(bench, side, meters.Memory(group, side.pids()), goal)
                        record = json.loads(watching.communicate()[0])
                most = max(record["away_at_once"][0])
                bench.say(f"holes, {side.name}, {repeat + 1} of {bench.repeats}: {most} pages away at once at most")
                yield {"experiment": "holes", "side": side.name, "repeat": repeat, "seconds": merging, **record}


def guest(bench: Bench) -> Iterator[Record]:
    """Two guests of KVM with the same memory, each of which reads a word of every page, again and again: how long that
    took at most, while they were merged."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        raise Skipped("needs /dev/kvm")
    seconds, goal = bench.sizes.guest_seconds, bench.sizes.guest << 20
    with tempfile.TemporaryDirectory(prefix="samepage-bench-") as folder:
        program = [compiled("guest.c", Path(folder) / "guest"), str(bench.sizes.guest), str(seconds), "0"]
        for repeat in range(bench.repeats):
            for make in (Side, *bench.both()):
                side = make()
                with sides.switches(bench.say), bench.group() as group, side:
                    first, second = side.start_programs([program] * 2, group)
                    if side.socket:  # the guests advise the kernel themselves
                        side.register()
                    memory = meters.Memory(group, side.pids())
                    before, started = memory.used(), time.perf_counter()
                    side.run(1)
                    if type(side) is not Side:
                        with contextlib.suppress(TimeoutError):
                            wait_until(
                                lambda: before - memory.used() >= 0.95 * goal,  # noqa: B023
                                "merged",
                                0.9 * seconds - (time.perf_counter() - started),
                                memory.every,
                            )
                    took, saved = time.perf_counter() - started, before - memory.used()
                    counts = [one.answer() for one in (first, second)]
                if any(wrong for _, _, wrong in counts):
                    raise OSError(f"a guest's memory is not what it was: {counts}")
                record = {
                    "rounds": sum(rounds for rounds, _, _ in counts) / 2 / seconds,
                    "longest_us": max(longest for _, longest, _ in counts),
                    "saved": saved,
                    "merging_seconds": took,
                }
                said = f"longest {record['longest_us'] / 1000:.0f} ms, {saved >> 20} MiB saved after {took:.1f} s"
                bench.say(f"guest, {side.name}, {repeat + 1} of {bench.repeats}: {said}")
                yield {"experiment": "guest", "side": side.name, "repeat": repeat, **record}


EXPERIMENTS: dict[str, Callable[[Bench], Iterator[Record]]] = {"stall": stall, "holes": holes, "guest": guest}
