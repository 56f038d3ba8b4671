"""Programs under a service, recorded as they run, and what the service's counters were meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.processes import environment
from samepage import agent
from samepage.fleet import key
from samepage.service.control import Client

EVERY = 0.5
LOOKS = 8
"""For so many looks nothing changes before the counters are compared. The simulation knows what changed only from the
look after it, and samepage can have merged it by then; the simulation takes its time from there."""

COUNTERS = ("pages_shared", "pages_sharing", "pages_unshared", "stable_node_dups", "bytes_saved")

PROGRAM = """
import sys
import numpy as np
def random(seed, mebibytes):
    return np.random.default_rng(seed).integers(0, 1 << 62, mebibytes << 17, np.int64)
held = {}
print("ready", flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""


class Worker:
    """A process that runs the lines of Python that it is told."""

    def __init__(self, socket: str, python: Path) -> None:
        loaded = {"LD_PRELOAD": str(agent.library_path()), "SAMEPAGE_SOCKET": socket}
        self._process = subprocess.Popen(
            [python, "-c", PROGRAM],
            env=environment() | loaded,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()
        self.pid = self._process.pid

    def _read(self) -> None:
        assert self._process.stdout
        assert self._process.stdout.readline(), "the worker has ended"

    def do(self, *lines: str) -> None:
        assert self._process.stdin
        for line in lines:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            self._read()

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@dataclass
class Run:
    """What goes on, and what was counted: `(look, counters)`."""

    socket: str
    python: Path
    directory: Path
    workers: list[Worker] = field(default_factory=list)
    counted: list[tuple[int, dict[str, int]]] = field(default_factory=list)

    def start(self, *lines: str) -> Worker:
        worker = Worker(self.socket, self.python)
        self.workers.append(worker)
        worker.do(*lines)
        return worker

    def set(self, **knobs: int | str) -> None:
        with Client(self.socket) as client:
            for name, value in knobs.items():
                client.ask("set", knob=name, value=str(value))

    def settle(self, seen: Callable[[dict[str, int]], bool] = lambda _: True) -> None:
        """Wait until the service has seen what happened, some passes changed nothing, and `LOOKS` looks have begun and
        ended since, and count."""
        deadline = time.monotonic() + 90
        while not seen(counters := self.counters()):
            assert time.monotonic() < deadline, counters
            time.sleep(0.1)
        while (now := self.counters())["full_scans"] < counters["full_scans"] + 4:
            if any(now[name] != counters[name] for name in COUNTERS):
                counters = now
            time.sleep(0.1)
        began = time.time_ns() // 1000
        while len(later := sorted(look for look in self._looks() if look > began)) < LOOKS:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        self.counted.append((later[LOOKS - 1], self.counters()))

    def _looks(self) -> list[int]:
        return [int(path.stem.rpartition(".")[2]) for path in self.directory.glob("mappings/*.parquet")]

    def end(self) -> None:
        for worker in self.workers:
            worker.end()

    def counters(self) -> dict[str, Any]:
        with Client(self.socket) as client:
            counters: dict[str, Any] = client.ask("status")["counters"]
        return counters


def own_parts(run: Run) -> None:
    """Three load the same 24 MiB, each with 6 MiB of its own and 4 MiB of zeros; one more comes later."""
    for seed in range(3):
        run.start("held['a'] = random(100, 24)", f"held['b'] = random({seed}, 6)", "held['c'] = np.full(1 << 19, 0)")
    run.settle()
    run.start("held['a'] = random(100, 24)", "held['b'] = random(9, 6)")
    run.settle()


def written(run: Run) -> None:
    """Two have the same 32 MiB; one writes a quarter of it, then makes it as it was; the other writes single pages."""
    one, other = (run.start("held['a'] = random(100, 32)") for _ in range(2))
    run.settle(lambda counters: counters["pages_sharing"] == 8192)
    one.do("held['a'][: 1 << 20] += 1")
    run.settle(lambda counters: counters["pages_sharing"] == 6144 and not counters["pages_broken"])
    one.do("held['a'][: 1 << 20] -= 1")
    run.settle(lambda counters: counters["pages_sharing"] == 8192)
    other.do("held['a'][1 << 21 :: 5120] += 1")
    run.settle(lambda counters: counters["pages_broken"] > 400)


def coming_and_going(run: Run) -> None:
    """Tables are dropped and loaded anew, in processes that end and others that begin."""
    first = run.start("held['a'] = random(1, 16)", "held['b'] = random(2, 16)")
    second = run.start("held['a'] = random(1, 16)", "held['b'] = random(3, 8)")
    run.settle()
    second.do("del held['b']", "held['c'] = random(2, 16)")
    run.settle()
    first.end()
    run.start("held['a'] = random(2, 16)", "held['b'] = random(4, 8)", "held['d'] = random(4, 8)")
    run.settle()


WORKLOADS: dict[str, tuple[Callable[[Run], None], dict[str, int | str]]] = {
    "own parts": (own_parts, {"max_page_sharing": 3}),
    "written": (written, {"advisor_mode": "none", "pages_to_scan": 20_000, "sleep_millisecs": 50}),
    "coming and going": (coming_and_going, {"smart_scan": 0}),
}
"""With what knobs they run. Zeros are merged as other pages are: those that samepage merges with the zero page are not
there afterwards, as if nobody had ever written them."""

ZEROS: dict[str, int | str] = {"use_zero_pages": 0}


@contextmanager
def recorded(
    workload: Callable[[Run], None], socket: str, knobs: dict[str, int | str], directory: Path
) -> Iterator[Run]:
    """The workload has run, and everything of it was recorded in `directory`; its processes are there still."""
    key.make(directory / "key")
    python = directory / f"worker-{os.getpid()}-{time.monotonic_ns()}"  # by that name they are found
    python.symlink_to(sys.executable)
    command = [sys.executable, "-m", "samepage", "record", "--name", python.name, "--sample", "1", "--cpu", "100000"]
    command += ["--daily", "1000G", "--every", str(EVERY), "-o", str(directory), "--key", str(directory / "key")]
    run = Run(socket, python, directory)
    run.set(**knobs)
    with ExitStack() as stack:
        stack.callback(run.end)
        run.start("held['a'] = random(1000, 1)")  # so that the recorder finds somebody
        recorder = stack.enter_context(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        stack.callback(recorder.kill)
        deadline = time.monotonic() + 60
        while not [*directory.glob("mappings/*.parquet")]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        workload(run)
        time.sleep(2 * EVERY)
        recorder.send_signal(signal.SIGINT)
        recorder.wait()
        yield run
