"""Processes that cannot answer (stopped, traced, in a frozen cgroup) hold up nobody but themselves, and what they
missed is made up for when they go on."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.oom import Worker, rows, samepage, wait_merged
from benchmarks.processes import wait_until
from tests.oom.conftest import Start, needs_agent
from tests.oom.test_promises import counters, knob, merged

pytestmark = needs_agent

PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_DETACH = 0x4206, 0x4207, 17
SOON = 1.0
"""Seconds that a command may take, and others to be merged beside a process that cannot answer."""

Halt = Callable[[int], Callable[[], None]]
"""Keeps a process from running. What it returns lets it go on."""


def by_signal(pid: int) -> Callable[[], None]:
    os.kill(pid, signal.SIGSTOP)
    return lambda: os.kill(pid, signal.SIGCONT)


def by_a_tracer(pid: int) -> Callable[[], None]:
    """As gdb does: all threads. All that a tracer does must be done by one thread of it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long] * 4
    held, let_go, gone = threading.Event(), threading.Event(), threading.Event()

    def trace() -> None:
        threads = [int(tid) for tid in os.listdir(f"/proc/{pid}/task")]
        for tid in threads:
            assert not libc.ptrace(PTRACE_SEIZE, tid, 0, 0), ctypes.get_errno()
            assert not libc.ptrace(PTRACE_INTERRUPT, tid, 0, 0), ctypes.get_errno()
            os.waitpid(tid, 0x40000000)  # __WALL
        held.set()
        let_go.wait()
        for tid in threads:
            libc.ptrace(PTRACE_DETACH, tid, 0, 0)
        gone.set()

    threading.Thread(target=trace, daemon=True).start()
    assert held.wait(10)

    def go_on() -> None:
        let_go.set()
        gone.wait()

    return go_on


def freezer(version: int) -> Path:
    """The root of a hierarchy that can freeze cgroups."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        kind = line.partition(" - ")[2].split()
        if kind[0] == "cgroup2" and version == 2:
            return Path(line.split()[4])
        if kind[0] == "cgroup" and version == 1 and "freezer" in kind[2].split(","):
            return Path(line.split()[4])
    pytest.skip(f"needs a freezer of cgroup v{version}")


def by_its_cgroup(version: int) -> Halt:
    def halt(pid: int) -> Callable[[], None]:
        above = freezer(version) / f"samepage-{os.getpid()}-{pid}"
        inside = above / "inside"  # it is the one above that is frozen
        name, frozen, thawed = ("freezer.state", "FROZEN", "THAWED") if version == 1 else ("cgroup.freeze", "1", "0")
        try:
            inside.mkdir(parents=True)
        except OSError as e:
            pytest.skip(f"needs to make cgroups: {e}")
        was = next(
            line.split(":", 2)[2]
            for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()
            if line.split(":")[1] == ("freezer" if version == 1 else "")
        )
        (inside / "cgroup.procs").write_text(str(pid))
        (above / name).write_text(frozen)

        def go_on() -> None:
            if above.exists():
                (above / name).write_text(thawed)
                (freezer(version) / was.lstrip("/") / "cgroup.procs").write_text(str(pid))
                wait_until(
                    lambda: emptied(inside), "empty"
                )  # of a process of the agent's, which it has for some milliseconds
                above.rmdir()

        return go_on

    return halt


def emptied(cgroup: Path) -> bool:
    """Remove it, if there is nobody in it."""
    with contextlib.suppress(OSError):
        cgroup.rmdir()
    return not cgroup.exists()


HALTS = {"stopped": by_signal, "traced": by_a_tracer, "frozen": by_its_cgroup(1), "frozen by v2": by_its_cgroup(2)}


@pytest.fixture(params=HALTS)
def halt(request: pytest.FixtureRequest) -> Iterator[Halt]:
    if os.geteuid() != 0:
        pytest.skip("needs root, to trace and to freeze")
    undo: list[Callable[[], None]] = []

    def do(pid: int) -> Callable[[], None]:
        undo.append(HALTS[request.param](pid))
        return undo[-1]

    do.state = request.param.split()[0]  # type: ignore[attr-defined]
    yield do
    for go_on in undo:
        with contextlib.suppress(OSError):
            go_on()


def register(start: Start, mib: int = 64) -> Worker:
    worker = start(mib, 16)
    worker.ask("register")
    return worker


def test_others_are_merged_in_the_usual_time(start: Start, socket: str, halt: Halt) -> None:
    halted = register(start)
    wait_until(lambda: halted.pid in rows(socket), "joined")
    go_on = halt(halted.pid)
    before = counters(socket)["full_scans"]
    started = time.monotonic()
    others = [register(start) for _ in range(2)]
    wait_merged(socket, others)
    took = time.monotonic() - started
    assert counters(socket)["full_scans"] > before
    found = rows(socket)
    assert {found[worker.pid]["state"] for worker in others} == {"running"}
    assert found[halted.pid]["state"] == halt.state  # type: ignore[attr-defined]
    go_on()
    wait_merged(socket, [halted])
    assert rows(socket)[halted.pid]["state"] == "running"
    assert all(worker.ask("verify") for worker in [halted, *others])
    assert took < SOON + 1  # two Pythons start meanwhile


def test_an_unmerge_says_at_once_whom_it_does_not_reach_and_makes_up_for_it(
    start: Start, socket: str, halt: Halt
) -> None:
    workers = [register(start) for _ in range(2)]
    wait_merged(socket, workers)
    go_on = halt(workers[0].pid)
    time.sleep(0.3)
    started = time.monotonic()
    done = samepage(socket, "unmerge", "--json")
    assert time.monotonic() - started < SOON
    answer = json.loads(done.stdout)
    remain = rows(socket)[workers[0].pid]
    assert (done.returncode, answer["errno"]) == (1, "ETIMEDOUT")
    assert f"process {workers[0].pid} " in done.stderr
    assert [(row["pid"], row["pages_remaining"]) for row in answer["failed"]] == [(workers[0].pid, remain["merged"])]
    assert answer["pages_remaining"] == remain["merged"] > 0
    assert remain["unmerge_pending"]
    assert merged(socket, workers[1]) == 0
    go_on()
    wait_until(lambda: not merged(socket, workers[0]), "unmerged")
    assert not rows(socket)[workers[0].pid]["unmerge_pending"]
    assert all(worker.ask("verify") for worker in workers)


@pytest.mark.parametrize("scanning", [True, False])
def test_run_2_says_so_within_a_second_and_what_was_skipped_is_unmerged_later(
    start: Start, socket: str, halt: Halt, scanning: bool
) -> None:
    workers = [register(start) for _ in range(3)]
    wait_merged(socket, workers)
    if not scanning:
        samepage(socket, "set", "run", "0")
    each = merged(socket, workers[0])
    going_on = [halt(worker.pid) for worker in workers[:2]]
    time.sleep(0.1 * scanning)
    started = time.monotonic()
    done = samepage(socket, "set", "run", "2")
    assert time.monotonic() - started < SOON
    said = re.search(r"timed out: (\d+) pages unmerged, (\d+) remain merged; (.*)", done.stderr)
    assert said is not None, done.stderr
    assert (int(said[1]), int(said[2])) == (each, 2 * each)
    state = halt.state  # type: ignore[attr-defined]
    for worker in workers[:2]:
        assert f"process {worker.pid} (python) does not answer (it is {state}), and is unmerged" in said[3]
    assert knob(socket, "run") == "0"
    assert counters(socket)["full_scans"] > 0
    for go_on in going_on:
        go_on()
    wait_until(lambda: not counters(socket)["pages_sharing"], "unmerged")
    assert not any(row["merged"] or row["unmerge_pending"] for row in rows(socket).values())
    assert knob(socket, "run") == "0"
    assert samepage(socket, "set", "run", "2").returncode == 0
    assert (knob(socket, "run"), counters(socket)["full_scans"]) == ("2", 0)
    assert all(worker.ask("verify") for worker in workers)


def test_run_1_takes_back_what_a_run_2_left_undone(start: Start, socket: str) -> None:
    workers = [register(start) for _ in range(2)]
    wait_merged(socket, workers)
    os.kill(workers[0].pid, signal.SIGSTOP)
    assert samepage(socket, "set", "run", "2").returncode == 1
    assert samepage(socket, "set", "run", "1").returncode == 0
    os.kill(workers[0].pid, signal.SIGCONT)
    wait_merged(socket, workers)
    assert not rows(socket)[workers[0].pid]["unmerge_pending"]


def test_a_process_that_is_stopped_again_and_again_in_the_middle_of_everything_is_merged_in_the_end(
    start: Start, socket: str
) -> None:
    samepage(socket, "set", "sleep_millisecs", "0")
    workers = [register(start) for _ in range(3)]
    for n in range(20):
        os.kill(workers[n % 2].pid, signal.SIGSTOP)
        time.sleep(0.15)
        os.kill(workers[n % 2].pid, signal.SIGCONT)
        time.sleep(0.05)
        for worker in workers:
            worker.ask("write", n)
    wait_merged(socket, workers)
    samepage(socket, "set", "run", "2")
    assert all(worker.ask("verify") for worker in workers)
