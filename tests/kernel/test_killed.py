"""Both engines are at work, and whatever of samepage is killed, no process is stopped or changed by it, and the next
start finds /sys/kernel/mm/ksm as it was."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import kernel_ksm
from benchmarks.processes import environment, wait_until
from tests.kernel import crew
from tests.kernel.conftest import mergeable, needs_ksm, samepage

ROUNDS = int(os.environ.get("SAMEPAGE_TEST_KILLS", "4"))
LATEST = 4.0
"""Seconds after the start by which everything is merged, nearly always."""


def knobs() -> dict[str, str]:
    files = sorted(file for file in kernel_ksm.KSM.iterdir() if file.stat().st_mode & 0o200)
    return {file.name: file.read_text() for file in files}


def status(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/status").read_text().partition(f"\n{name}:\t")[2].partition("\n")[0]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Run:
    """`samepage run --engine auto` of a crew."""

    def __init__(self, holder: Path) -> None:
        command = [sys.executable, "-m", "samepage", "run", "--engine", "auto", "--", sys.executable, crew.__file__]
        self.process = subprocess.Popen(
            [*command, str(holder)],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        self.crew: list[int] = json.loads(self.process.stdout.readline())
        parent = int(status(self.crew[0], "PPid"))
        ours = [child for child in children(self.process.pid) if child != parent]
        self.service = ours[0]  # the other one attaches
        self.parent = parent
        self.ours = [*ours, self.process.pid]

    def kill(self, what: str) -> None:
        for pid in {"service": [self.service], "run": [self.process.pid], "all": self.ours}[what]:
            os.kill(pid, signal.SIGKILL)

    def wrong(self) -> list[str]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        found: list[str] = json.loads(self.process.stdout.readline())
        return found

    def end(self) -> None:
        self.process.communicate(timeout=30)
        wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in (*self.crew, self.parent)), "ended", 30)


@needs_ksm
@pytest.mark.timeout(60 + 20 * ROUNDS)
def test_whatever_is_killed_at_any_moment_no_process_changes_and_the_next_start_puts_everything_back(
    holder: Path,
) -> None:
    merged: Counter[str] = Counter()
    with kernel_ksm.borrowed(run=0, **(kernel_ksm.DEFAULTS | {"advisor_mode": "none"})):
        before = knobs()
        for n in range(ROUNDS):
            run = Run(holder)
            time.sleep(random.random() * LATEST)
            merged["attached"] += sum(mergeable(pid) for pid in run.crew)
            merged["merged"] += sum(kernel_ksm.merging_pages(pid) > 0 for pid in run.crew)
            what = ("service", "run", "all")[n % 3]
            run.kill(what)
            time.sleep(0.02)
            states = [(status(pid, "State")[0], status(pid, "TracerPid")) for pid in run.crew]
            assert all(state in "RSD" and tracer == "0" for state, tracer in states), (n, what, states)
            assert run.wrong() == ["0"] * 4, (n, what)
            run.end()
            assert samepage("run", "--engine", "auto", "--", "true").returncode == 0
            assert knobs() == before, (n, what)
    print(f"{ROUNDS} rounds, {merged['attached']} attached and {merged['merged']} merged of {4 * ROUNDS}")
    assert ROUNDS < 4 or merged["attached"]
