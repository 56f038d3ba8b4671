"""`run` = 2 while processes join, fork and exit: it comes to its end, and misses nobody."""

from __future__ import annotations

import random
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.processes import environment, wait_until
from samepage import agent
from samepage.service.control import Client
from tests.agent.preload import compile_c
from tests.oom.conftest import needs_agent

pytestmark = needs_agent

STAYING, COMING = 3, 4


class Churn:
    """Some processes that stay, and `coming` at any time that come, fork and go."""

    def __init__(self, program: Path, socket: str, coming: int = COMING) -> None:
        self._program = str(program)
        self._environment = environment(SAMEPAGE_SOCKET=socket, LD_PRELOAD=str(agent.library_path()))
        self.staying = [self._start("stay") for _ in range(STAYING)]
        self.came = 0
        self._coming = coming
        self.failed: list[int] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _start(self, argument: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([self._program, argument], env=self._environment)

    def _run(self) -> None:
        chance = random.Random(1)
        here: list[subprocess.Popen[bytes]] = []
        while not self._ending.wait(0.005):
            self.failed += [p.returncode for p in here if p.poll()]
            here = [p for p in here if p.poll() is None]
            while len(here) < self._coming:
                here.append(self._start(str(chance.randrange(20, 300))))
                self.came += 1
        self.failed += [code for p in here if (code := p.wait(60))]

    def __enter__(self) -> Churn:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()

    def end(self) -> None:
        self._ending.set()
        self._thread.join()
        for process in self.staying:
            process.kill()
            process.wait()


@pytest.fixture
def churn(socket: str, tmp_path: Path) -> Iterator[Churn]:
    with Churn(compile_c(Path(__file__).with_name("churn.c"), tmp_path / "churn"), socket) as made:
        yield made


def rows(client: Client) -> dict[int, int]:
    return {row["pid"]: row["merged"] for row in client.ask("status").get("processes", [])}


def maps_segments(pid: int) -> bool:
    """Whether any of its memory is a segment's. What was unmerged is anonymous memory again."""
    try:
        return "memfd:samepage" in Path(f"/proc/{pid}/maps").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def unmerge_all(churn: Churn, socket: str, rounds: int) -> None:
    staying = {process.pid for process in churn.staying}
    with Client(socket, timeout=60.0) as client:
        for _ in range(rounds):
            client.ask("set", knob="run", value="1")
            wait_until(lambda: all(rows(client).get(pid, 0) > 400 for pid in staying), "merged", 60, every=0.002)
            before = rows(client)
            client.ask("set", knob="run", value="2")
            after = rows(client)
            assert {pid: n for pid, n in after.items() if n} == {}
            assert staying <= after.keys()
            # A pid that was there before, and is now: the walk has passed it.
            assert [pid for pid in before.keys() & after.keys() if maps_segments(pid)] == []


def test_run_2_reaches_a_forked_child_that_has_not_touched_its_memory(socket: str, tmp_path: Path) -> None:
    """Of what is merged, it has not even page table entries."""
    with Churn(compile_c(Path(__file__).with_name("churn.c"), tmp_path / "churn"), socket, coming=0) as churn:
        staying = {process.pid for process in churn.staying}
        with Client(socket, timeout=60.0) as client:
            wait_until(lambda: all(rows(client).get(pid, 0) > 400 for pid in staying), "merged", 60)
            churn.staying[0].send_signal(signal.SIGUSR1)
            wait_until(lambda: sum(n > 400 for n in rows(client).values()) == STAYING + 1, "the child merged", 60)
            client.ask("set", knob="run", value="2")
            assert set(rows(client).values()) == {0}
            assert len(rows(client)) == STAYING + 1
            assert [pid for pid in rows(client) if maps_segments(pid)] == []


def test_run_2_reaches_everybody_while_processes_come_fork_and_go(churn: Churn, socket: str) -> None:
    unmerge_all(churn, socket, 20)
    churn.end()
    assert churn.came > COMING
    assert churn.failed == []


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_run_2_a_thousand_times(churn: Churn, socket: str) -> None:
    unmerge_all(churn, socket, 1000)
    churn.end()
    assert churn.came > 1000
    assert churn.failed == []
