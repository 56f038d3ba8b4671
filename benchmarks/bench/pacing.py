"""How soon ksmd merges, and for how much CPU time: paced by samepage, as it comes, and as others set it.

What differs between the sides is the knobs of /sys/kernel/mm/ksm alone, and who sets them when.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import kernel_ksm
from benchmarks.bench import meters, sides
from benchmarks.bench.measures import Bench, Record, Skipped, memory_worker, pages_of, watch
from benchmarks.bench.process import PAGE_SIZE
from benchmarks.bench.rows import ADVISOR, PACED, TUNED
from benchmarks.bench.sides import Kernel
from benchmarks.processes import environment, service

AFTERWARDS = 10.0
"""Seconds over which is looked what ksmd goes on to take."""

REPEATS = 3
"""Of the larger size, at most."""


class Paced(Kernel):
    """`samepage daemon --engine auto`, and workers that are attached to when they are to be merged."""

    def __init__(self) -> None:
        super().__init__(PACED, kernel_ksm.DEFAULTS)

    def __enter__(self) -> Paced:
        super().__enter__()
        self._before = meters.waited_for()
        return self

    def register(self) -> None:
        kernel_ksm.set_knobs(**self.knobs | {"run": "0"})
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="samepage-bench-"))
        self._daemon = sides.who_listens(self._stack.enter_context(service(Path(folder), "--engine", "auto")))

    def run(self, value: int) -> None:
        if self.workers:
            command = "attach" if value == 1 else "detach"
            arguments = [command, *(str(pid) for pid in self.pids())]
            subprocess.run([sys.executable, "-m", "samepage", *arguments], env=environment(), check=True)

    def cpu_seconds(self) -> float:
        return super().cpu_seconds() + meters.process_cpu(self._daemon) + meters.waited_for() - self._before


def advisor() -> Kernel:
    """The kernel's own, as it is when it is switched on."""
    kept = {name: value for name, value in kernel_ksm.DEFAULTS.items() if name != "pages_to_scan"}
    return Kernel(ADVISOR, kept | {"advisor_mode": "scan-time"})


def tuned() -> Kernel:
    """What ksmtuned sets when memory was short for some minutes: KSM_NPAGES_MAX, and KSM_SLEEP_MSEC by the memory that
    there is, of its ksmtuned.conf. Before it starts at all four fifths of the memory are in use."""
    gib = os.sysconf("SC_PHYS_PAGES") * PAGE_SIZE / (1 << 30)
    sleep = str(max(10, int(10 * 16 / gib)))
    return Kernel(TUNED, kernel_ksm.DEFAULTS | {"pages_to_scan": "1250", "sleep_millisecs": sleep})


def paced(bench: Bench) -> Iterator[Record]:
    """Two processes with the same pages, merged by the kernel, of two sizes."""
    if not bench.kernel():
        raise Skipped("needs the kernel's KSM")
    slow: list[Callable[[], Kernel]] = [sides.defaults]  # once: each takes as long as it may
    if (kernel_ksm.KSM / "advisor_mode").exists():
        slow.append(advisor)
    for repeat in range(bench.repeats):
        for make in (Paced, sides.fastest, tuned, *(() if repeat else slow)):
            yield _measured(bench, make(), bench.sizes.same, repeat)
    for repeat in range(min(bench.repeats, REPEATS)):
        for make in (Paced, sides.fastest):
            yield _measured(bench, make(), bench.sizes.paced, repeat)


def _measured(bench: Bench, side: Kernel, mib: int, repeat: int) -> Record:
    """All memory of the processes is mergeable on every side, as `samepage attach` has it: all have the same work."""
    npages = pages_of(mib)
    limit = 4 * bench.sizes.defaults_limit
    side.advice = "advise_all"
    with sides.switches(bench.say), bench.group() as group, side:
        side.start([memory_worker([(0, npages, 0)])] * 2, group, NUMPY_MADVISE_HUGEPAGE="0")
        side.register()
        curve = watch(side, meters.Memory(group, side.pids()), npages * PAGE_SIZE, limit)
        cpu = side.cpu_seconds()
        time.sleep(AFTERWARDS)
        afterwards = (side.cpu_seconds() - cpu) / AFTERWARDS
        saved = side.saved()
        side.run(0)
    bench.say(f"paced, {side.name}, {mib} MiB, {repeat + 1}: {curve.seconds[-1]:.1f} s")
    record: Record = {"experiment": "paced", "side": side.name, "repeat": repeat, "mib": mib}
    record |= {"goal": npages * PAGE_SIZE, "curve": vars(curve), "finished": curve.finished, "saved_counters": saved}
    return record | {"cpu_share_afterwards": afterwards}


EXPERIMENTS: dict[str, Callable[[Bench], Iterator[Record]]] = {"paced": paced}
