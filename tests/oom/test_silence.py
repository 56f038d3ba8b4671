"""A process that is stopped, or silent for another reason, keeps its merged pages: who asks for an unmerge is told."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from benchmarks.oom import Worker, rows, samepage, wait_merged
from benchmarks.processes import environment, wait_until
from samepage.memory.conversation import CANCEL_PATIENCE
from tests.oom.conftest import Start, needs_agent
from tests.oom.test_promises import counters, knob, merged
from tests.service import fake_agent

pytestmark = needs_agent

PROMPT = 1.0
"""Seconds that a command may take to start, ask and end, on a busy machine; a process has ten to answer."""

FAKE_PAGES = 64


@pytest.fixture
def workers(start: Start, socket: str) -> Iterator[list[Worker]]:
    """Two merged workers, the first of which is stopped. ksmd is stopped too."""
    workers = [start(64, 16) for _ in range(2)]
    for worker in workers:
        worker.ask("register")
    wait_merged(socket, workers)
    samepage(socket, "set", "run", "0")
    os.kill(workers[0].pid, signal.SIGSTOP)
    yield workers
    with contextlib.suppress(ProcessLookupError):
        os.kill(workers[0].pid, signal.SIGCONT)


def test_run_2_that_does_not_reach_a_process_is_an_error_until_it_does(workers: list[Worker], socket: str) -> None:
    all_of_it = [merged(socket, worker) for worker in workers]
    for unmerged in (all_of_it[1], 0):
        started = time.monotonic()
        done = samepage(socket, "set", "run", "2")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        said = re.search(
            rf"timed out: (\d+) pages unmerged, (\d+) remain merged; process {workers[0].pid} \(.*\) does not answer",
            done.stderr,
        )
        assert said is not None, done.stderr
        assert (int(said[1]), int(said[2])) == (unmerged, all_of_it[0])
        assert knob(socket, "run") == "0"
        assert counters(socket)["full_scans"] > 0
        assert time.monotonic() - started < PROMPT
    os.kill(workers[0].pid, signal.SIGCONT)
    wait_until(lambda: not samepage(socket, "set", "run", "2").returncode, "unmerged")
    assert (knob(socket, "run"), counters(socket)["pages_sharing"]) == ("2", 0)
    assert all(worker.ask("verify") for worker in workers)


@pytest.mark.parametrize("which", ["all", "its pid"])
def test_an_unmerge_that_does_not_reach_a_process_names_it(workers: list[Worker], socket: str, which: str) -> None:
    all_of_it = [merged(socket, worker) for worker in workers]
    arguments = ["--json"] + ["--pid", str(workers[0].pid)] * (which == "its pid")
    for unmerged in (all_of_it[1] if which == "all" else 0, 0):
        done = samepage(socket, "unmerge", *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert f"process {workers[0].pid} " in done.stderr
        answer = json.loads(done.stdout)
        assert (answer["errno"], answer["pages_unmerged"]) == ("ETIMEDOUT", unmerged)
        assert answer["pages_remaining"] == all_of_it[0]
        assert [(row["pid"], row["pages_remaining"]) for row in answer["failed"]] == [(workers[0].pid, all_of_it[0])]


def test_a_process_that_ended_has_nothing_left_to_unmerge(workers: list[Worker], socket: str) -> None:
    assert samepage(socket, "unmerge", "--pid", str(workers[0].pid)).returncode == 1
    workers[0].end()
    done = samepage(socket, "unmerge")
    assert (done.returncode, done.stderr) == (0, "")
    assert samepage(socket, "set", "run", "2").returncode == 0


@pytest.fixture
def dumb(socket: str) -> Iterator[list[int]]:
    """Two merged processes that run, and do not answer when they are to be unmerged."""
    with contextlib.ExitStack() as stack:
        pids = [stack.enter_context(fake(socket, "dumb")) for _ in range(2)]
        wait_until(lambda: all(rows(socket).get(pid, {}).get("merged") == FAKE_PAGES for pid in pids), "merged")
        yield pids


@contextlib.contextmanager
def fake(socket: str, lie: str) -> Iterator[int]:
    """A fake agent in a process of its own."""
    arguments = [sys.executable, fake_agent.__file__, socket, "1", str(FAKE_PAGES), lie]
    with subprocess.Popen(arguments, env=environment(), stdout=subprocess.DEVNULL) as process:
        yield process.pid
        process.kill()


@pytest.mark.parametrize("command", [["unmerge", "--json"], ["set", "run", "2"]])
def test_ctrl_c_does_not_wait_for_a_process_that_does_not_answer(
    dumb: list[int], socket: str, command: list[str]
) -> None:
    arguments = [sys.executable, "-m", "samepage", *command, "--socket", socket]
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, env=environment(), text=True, stdout=pipe, stderr=pipe) as process:
        time.sleep(2)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert time.monotonic() - started < CANCEL_PATIENCE + 0.5
    if command[0] == "unmerge":
        answer = json.loads(out)
        assert (process.returncode, answer["errno"], answer["pages_unmerged"]) == (1, "EINTR", 0)
        assert answer["pages_remaining"] >= FAKE_PAGES
        assert "interrupted" in err
    else:
        assert process.returncode == 130
        wait_until(lambda: knob(socket, "run") == "0", "stopped")
    started = time.monotonic()
    assert samepage(socket, "get", "run").returncode == 0
    assert samepage(socket, "set", "run", "0").returncode == 0  # nobody holds what it needs any more
    assert time.monotonic() - started < 2 * PROMPT


def unmerge_interrupted(socket: str) -> tuple[int, str, float]:
    """`samepage unmerge`, and Ctrl-C after a second: the exit status, stderr, and seconds from Ctrl-C to the end."""
    arguments = [sys.executable, "-m", "samepage", "unmerge", "--socket", socket]
    with subprocess.Popen(arguments, env=environment(), text=True, stderr=subprocess.PIPE) as process:
        time.sleep(1)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    return process.returncode, err, time.monotonic() - started


def test_ctrl_c_does_not_wait_for_a_scan_that_waits_for_such_a_process(socket: str) -> None:
    with fake(socket, "hang"):
        time.sleep(2)  # ksmd asks, and waits for an answer
        status, err, seconds = unmerge_interrupted(socket)
        assert seconds < 0.5
        assert (status, "interrupted" in err) == (1, True), err


def test_a_service_that_is_stopped_does_not_hold_up_ctrl_c_for_long(workers: list[Worker], socket: str) -> None:
    from samepage.service.control import CANCEL_PATIENCE, Client
    from samepage.service.sockets import peer

    with Client(socket) as client:
        service = peer(client._sock).pid
    os.kill(service, signal.SIGSTOP)
    try:
        status, err, seconds = unmerge_interrupted(socket)
        assert seconds < CANCEL_PATIENCE + 1
        assert (status, err) == (1, "samepage: the service does not answer\n")
    finally:
        os.kill(service, signal.SIGCONT)
