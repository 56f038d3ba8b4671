"""Who merges: samepage, the kernel, or nobody. To a measurement they are all alike.

The kernel's KSM is borrowed by the measurement (`switches`) and not by a side, for a measurement may have several at
the same time, of which only one works at a time.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import kernel_ksm
from benchmarks.bench import meters
from benchmarks.bench.process import PAGE_SIZE
from benchmarks.memory_cgroup import MemoryCgroup
from benchmarks.processes import Commanded, service, wait_until
from samepage.service import sockets
from samepage.service.control import Client

RMAP_ITEM = Path("/sys/kernel/slab/ksm_rmap_item/object_size")
STABLE_NODE = Path("/sys/kernel/slab/ksm_stable_node/object_size")
SHMEM_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
"""Whether the kernel may take large folios for memfds, those of all programs (admin-guide/mm/transhuge.rst)."""


@contextlib.contextmanager
def switches(say: Callable[[str], None]) -> Iterator[None]:
    """Have the kernel's KSM to ourselves, stopped; everything is put back. Where this user may not set it, nothing."""
    with contextlib.ExitStack() as stack:
        if kernel_ksm.available():
            if kernel_ksm.in_use():
                say("somebody else has borrowed the kernel's KSM: waiting")
            stack.enter_context(kernel_ksm.borrowed(run=0))
            if os.sched_getscheduler(0) == os.SCHED_RR:  # --realtime is for both sides
                stack.enter_context(_realtime(kernel_ksm.ksmd()))
        yield


@contextlib.contextmanager
def _realtime(pid: int) -> Iterator[None]:
    before = os.sched_getscheduler(pid), os.sched_getparam(pid)
    os.sched_setscheduler(pid, os.SCHED_RR, os.sched_param(1))
    try:
        yield
    finally:
        os.sched_setscheduler(pid, *before)


@dataclass(frozen=True)
class Metadata:
    """What knowing `pages` pages takes. `how` says where that is from."""

    bytes: int
    pages: int
    how: str


class Side:
    """Nobody merges: how things are without."""

    name = "alone"
    cycle = 1
    """After how many passes, over memory that does not change, costs repeat."""
    socket: str | None = None
    """Of the service, if processes are to run under the agent."""

    def __init__(self) -> None:
        self.workers: list[Commanded] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, commands: list[list[str]], group: MemoryCgroup | None = None, **more: str) -> list[Commanded]:
        """Start workers (process.py), all at once, and wait until they are ready. They end with this side."""
        python = [sys.executable, "-m", "benchmarks.bench.process"]
        return self.start_programs([[*python, *command] for command in commands], group, **more)

    def start_programs(
        self, commands: list[list[str]], group: MemoryCgroup | None = None, **more: str
    ) -> list[Commanded]:
        """The same with any programs that say when they are ready."""
        started = []
        for command in commands:
            started.append(Commanded(command, group, self.socket, **more))
            self._stack.callback(started[-1].end)
        for worker in started:
            worker.answer()
        self.workers += started
        return started

    def register(self) -> None:
        """Give the workers' memory over to be merged, once they are all there; nothing is merged before `run(1)`."""

    def run(self, value: int) -> None:
        """As one writes it to /sys/kernel/mm/ksm/run: merge (1), stop (0), unmerge everything (2)."""

    def cpu_seconds(self) -> float:
        """CPU time spent on merging so far, whoever spent it."""
        return 0.0

    def full_scans(self) -> int:
        """Passes over all memory so far."""
        return 0

    def saved(self) -> int:
        """Bytes saved, as the side's own counters have it."""
        return 0

    def pages_merged(self) -> int:
        """Pages of all processes that stand for others' or for which others' stand."""
        return 0

    def counters(self) -> dict[str, Any]:
        """All that the side counts."""
        return {}

    def metadata(self) -> Metadata | None:
        return None

    def own_memory(self) -> int:
        """Bytes of private memory that who merges takes, where it is a process."""
        return 0

    def settle(self) -> None:
        """Wait, merging being on, until a pass costs what it will go on to cost."""

    def passes(self, count: int, before_each: Callable[[], Any] | None = None) -> list[float]:
        """CPU seconds of each of `count` passes, merging being on, after something was done before it."""
        return []

    def pids(self) -> list[int]:
        """Of the workers."""
        return [worker.pid for worker in self.workers]

    def busy(self) -> list[int]:
        """Processes and threads that merge, by the id that sched_setaffinity(2) takes."""
        return []


class Samepage(Side):
    """`samepage daemon` as it is without any option, and the workers under its agent."""

    name = "samepage"
    cycle = 9

    def __enter__(self) -> Samepage:
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="samepage-bench-"))
        self.socket = self._stack.enter_context(service(Path(folder)))
        self.pid = who_listens(self.socket)
        self.run(0)
        self._agents: meters.AgentCpu | None = None
        return self

    def register(self) -> None:
        wait_until(self._joined, "joined by all workers", seconds=60)
        self._agents = meters.AgentCpu(self.pids())

    def __exit__(self, *_: object) -> None:
        if self._agents is not None:
            self._agents.close()
        super().__exit__()

    def run(self, value: int) -> None:
        self._ask("set", knob="run", value=str(value))

    def cpu_seconds(self) -> float:
        assert self._agents is not None
        return meters.process_cpu(self.pid) + self._agents.seconds()

    def full_scans(self) -> int:
        return int(self.counters()["full_scans"])

    def saved(self) -> int:
        return int(self.counters()["bytes_saved"])

    def pages_merged(self) -> int:
        return sum(row["ksm_merging_pages"] for row in self._rows())

    def counters(self) -> dict[str, Any]:
        found: dict[str, Any] = self._ask("stats")["counters"]
        return found

    def metadata(self) -> Metadata:
        pages = sum(row["ksm_rmap_items"] for row in self._rows())
        return Metadata(int(self.counters()["metadata_bytes"]), pages, "metadata_bytes of samepage status")

    def own_memory(self) -> int:
        return meters.private(self.pid)

    def settle(self) -> None:
        # Where nothing happens, a process is looked at in full in passes 2, 4, 7, 12, 21, and then in every ninth.
        wait_until(lambda: self.full_scans() >= 21, "21 passes", every=0.5)

    def passes(self, count: int, before_each: Callable[[], Any] | None = None) -> list[float]:
        # Nothing is asked of the service meanwhile, for an answer costs as much as a pass. Passes are a second apart
        # while nothing happens, more where looking is not worth it, and closer where something changed: what a change
        # costs is all that is spent for it.
        costs: list[float] = []
        window = 2.0
        while len(costs) < count:
            if window > 64:
                raise TimeoutError("not through a pass in a minute")
            scans, cpu = self.full_scans(), self.cpu_seconds()
            if before_each is not None:
                before_each()
            time.sleep(window)
            spent, made = self.cpu_seconds() - cpu, self.full_scans() - scans
            if made:
                costs += [spent] if before_each else [spent / made] * made
            else:
                window *= 2
        return costs

    def busy(self) -> list[int]:
        own = [int(task.name) for task in Path(f"/proc/{self.pid}/task").iterdir()]
        return own + [int(task.name) for pid in self.pids() for task in meters.threads(pid, "samepage")]

    def _joined(self) -> bool:
        self.run(0)  # while it stands still, a service takes in who joined only when it is told something
        return len(self._rows()) == len(self.workers)

    def _rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self._ask("status").get("processes", [])
        return rows

    def _ask(self, op: str, **arguments: str) -> dict[str, Any]:
        assert self.socket is not None
        with Client(self.socket, timeout=None) as client:
            return client.ask(op, **arguments)


class LargeFolios(Samepage):
    """The same where the kernel may take large folios for the segments."""

    name = "samepage, large folios"

    def __enter__(self) -> LargeFolios:
        now = re.search(r"\[(\w+)\]", SHMEM_ENABLED.read_text())
        assert now is not None
        self._stack.callback(SHMEM_ENABLED.write_text, now[1])
        SHMEM_ENABLED.write_text("within_size")
        super().__enter__()
        return self


def who_listens(path: str) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(path)
        return sockets.peer(connection).pid


class Kernel(Side):
    """The kernel's KSM with these knobs; the workers ask for it with madvise(2)."""

    advice = "advise"
    """What they are told for that."""

    def __init__(self, name: str, knobs: dict[str, str]) -> None:
        super().__init__()
        self.name = name
        self.knobs = knobs
        # With smart_scan a page that was long looked at in vain is passed over eight times (skip_age() in mm/ksm.c);
        # pages of one age are all looked at in the same pass.
        self.cycle = 9 if knobs["smart_scan"] == "1" else 1
        self._ksmd = kernel_ksm.ksmd()

    def __enter__(self) -> Kernel:
        kernel_ksm.write("run", 2)  # forgets those that have ended, which would be counted against the next
        self.run(0)
        return self

    def __exit__(self, *_: object) -> None:
        kernel_ksm.write("run", 0)
        super().__exit__()

    def register(self) -> None:
        for worker in self.workers:
            worker.ask(self.advice)

    def run(self, value: int) -> None:
        if value == 1:
            kernel_ksm.set_knobs(**self.knobs)
        else:
            kernel_ksm.write("run", value)

    def cpu_seconds(self) -> float:
        return meters.process_cpu(self._ksmd)

    def full_scans(self) -> int:
        return kernel_ksm.read("full_scans")

    def saved(self) -> int:
        return (kernel_ksm.read("pages_sharing") + kernel_ksm.read("ksm_zero_pages")) * PAGE_SIZE

    def pages_merged(self) -> int:
        return kernel_ksm.read("pages_shared") + kernel_ksm.read("pages_sharing")

    def counters(self) -> dict[str, Any]:
        return kernel_ksm.counters()

    def settle(self) -> None:
        # With the pass that `passes` waits for: after two, pages are in the unstable tree; after thirteen, they are
        # passed over eight times.
        until_passes(self, 12 if self.cycle > 1 else 1)

    def passes(self, count: int, before_each: Callable[[], Any] | None = None) -> list[float]:
        costs = []
        until_passes(self, 1)
        for _ in range(count):
            cpu = self.cpu_seconds()
            if before_each is not None:
                before_each()
            until_passes(self, 1)
            costs.append(self.cpu_seconds() - cpu)
        return costs

    def metadata(self) -> Metadata:
        # general_profit is what is saved less what the rmap_items take (ksm_general_profit() in mm/ksm.c).
        rmap_items = self.saved() - kernel_ksm.read("general_profit")
        sizes = [int(size.read_text()) if size.exists() else 64 for size in (RMAP_ITEM, STABLE_NODE)]
        nodes = kernel_ksm.read("pages_shared") + kernel_ksm.read("stable_node_chains")
        how = (
            f"rmap_items from general_profit, {sizes[0]} bytes each; {sizes[1]} bytes a stable node (/sys/kernel/slab)"
        )
        return Metadata(rmap_items + nodes * sizes[1], rmap_items // sizes[0], how)

    def busy(self) -> list[int]:
        return [self._ksmd]


def fastest() -> Kernel:
    """ksmd as fast as it can be made to scan."""
    return Kernel("ksmd fastest", kernel_ksm.DEFAULTS | kernel_ksm.FASTEST)


def fastest_unskipping() -> Kernel:
    """The same, looking at every page in every pass."""
    return Kernel("ksmd fastest, smart_scan 0", kernel_ksm.DEFAULTS | kernel_ksm.FASTEST | {"smart_scan": "0"})


def defaults() -> Kernel:
    """ksmd as the kernel comes."""
    return Kernel("ksmd defaults", kernel_ksm.DEFAULTS)


def until_passes(side: Side, passes: int) -> None:
    """Wait until a side has made so many passes more. TimeoutError."""
    goal = side.full_scans() + passes
    wait_until(lambda: side.full_scans() >= goal, f"through {passes} passes", 600, every=0.001)
