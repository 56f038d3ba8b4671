"""A system call is made in a process's name, and the process does not notice: not even if whoever made it is killed."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.processes import wait_until
from samepage import inject
from tests.agent.preload import compile_c

ROUNDS = int(os.environ.get("SAMEPAGE_TEST_ATTACHES", "200"))
KINDS = ["registers", "sleeping", "reading", "receiving", "futexes", "polling", "epolling", "epolling_for_a_time"]
KINDS += ["semaphores", "signals", "waiting_for_signals", "receiving_several", "connecting"]
SYS_GETPID, SYS_CLOSE = 39, 3

TRACER = """
import sys
from benchmarks.processes import wait_until
from samepage import inject
pid = int(sys.argv[1])
print("go", flush=True)
while True:
    inject.make_calls(pid, [(39,)] * 5)
"""


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ("-mavx", "-fno-stack-protector", "-pthread")
    return compile_c(Path(__file__).with_name("checked.c"), tmp_path_factory.mktemp("inject") / "checked", *flags)


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(program: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [str(program), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def finish(process: subprocess.Popen[str]) -> dict[str, int]:
    """What it did how often, all of it as it should be."""
    said, errors = process.communicate("x", timeout=30)
    assert (process.returncode, errors) == (0, "")
    return {name: int(count) for name, count in (line.split() for line in said.splitlines())}


def status(process: subprocess.Popen[str], name: str) -> str:
    text = Path(f"/proc/{process.pid}/status").read_text()
    return text.partition(f"\n{name}:\t")[2].partition("\n")[0]


@pytest.mark.parametrize("kind", KINDS)
def test_who_does_one_thing_does_not_notice(start: Start, kind: str) -> None:
    process = start(kind)
    for _ in range(ROUNDS):
        assert inject.make_calls(process.pid, [(SYS_GETPID,), (SYS_CLOSE, 12345), (SYS_GETPID,)]) == [process.pid, -9]
    assert status(process, "TracerPid") == "0"
    time.sleep(0.05)
    assert finish(process)[kind]


TURN_SECONDS = 8.0
"""In which the program does everything once, on a machine that is not much slower than ours."""


def test_who_does_all_in_turn_does_not_notice(start: Start) -> None:
    process = start()
    rounds, until = 0, time.monotonic() + TURN_SECONDS
    while rounds < ROUNDS or time.monotonic() < until:
        assert inject.make_calls(process.pid, [(SYS_GETPID,)]) == [process.pid]
        time.sleep(random.random() * 0.004)
        rounds += 1
    assert min(finish(process).values())


@pytest.mark.parametrize("kind", ["", "registers", "sleeping", "signals"])
def test_a_tracer_that_is_killed_leaves_the_process_as_it_was(start: Start, kind: str) -> None:
    process = start("-e", *filter(None, [kind]))
    for _ in range(ROUNDS // 8):
        tracer = subprocess.Popen([sys.executable, "-c", TRACER, str(process.pid)], stdout=subprocess.PIPE, text=True)
        assert tracer.stdout is not None
        assert tracer.stdout.readline() == "go\n"
        time.sleep(random.random() * 0.02)
        tracer.kill()
        tracer.communicate()
        assert process.poll() is None
        assert status(process, "TracerPid") == "0"
    time.sleep(0.1)
    assert status(process, "State")[0] in "RS"
    finish(process)


def test_a_process_that_ends_meanwhile_is_said_to_have_ended(start: Start) -> None:
    process = start()
    process.kill()
    process.wait()
    with pytest.raises(inject.InjectError, match="it has ended"):
        inject.make_calls(process.pid, [(SYS_GETPID,)])


def test_a_process_that_is_stopped_stays_stopped_and_is_left_alone(start: Start) -> None:
    process = start("reading")
    process.send_signal(signal.SIGSTOP)
    wait_until(lambda: status(process, "State")[0] == "T", "stopped")
    with pytest.raises(inject.InjectError, match="stopped by a signal"):
        inject.make_calls(process.pid, [(SYS_GETPID,)])
    wait_until(lambda: status(process, "State")[0] == "T", "stopped again, once it was let go")
    process.send_signal(signal.SIGCONT)
    assert finish(process)["reading"]


def test_a_process_that_is_stopped_and_continued_meanwhile_goes_on(start: Start) -> None:
    process = start("-e")
    for _ in range(ROUNDS):
        process.send_signal(signal.SIGSTOP)
        if random.random() < 0.5:
            process.send_signal(signal.SIGCONT)
        with contextlib.suppress(inject.InjectError):
            assert inject.make_calls(process.pid, [(SYS_GETPID,)] * 3) == [process.pid] * 3
        process.send_signal(signal.SIGCONT)
    assert min(finish(process).values())


def test_the_memory_below_the_stack_is_what_it_was(start: Start) -> None:
    process = start("reading")
    stack = next(line for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines() if "[stack]" in line)
    first, past = (int(address, 16) for address in stack.split()[0].split("-"))

    def marks() -> int:
        with open(f"/proc/{process.pid}/mem", "rb", buffering=0) as memory:
            memory.seek(first)
            return (memory.read(past - first) or b"").count(0x46505853.to_bytes(4, "little"))

    before = marks()
    inject.make_calls(process.pid, [(SYS_GETPID,)])
    assert marks() == before


@pytest.mark.skipif(not shutil.which("go"), reason="needs Go")
def test_goroutines_on_stacks_of_their_own_do_not_notice(tmp_path: Path) -> None:
    program = tmp_path / "goroutines"
    environment = os.environ | {"CGO_ENABLED": "0", "GOCACHE": str(tmp_path / "cache"), "GOFLAGS": "-mod=mod"}
    source = Path(__file__).with_name("goroutines.go")
    subprocess.run(["go", "build", "-o", str(program), str(source)], env=environment, check=True)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([str(program)], text=True, **pipes)  # type: ignore[call-overload]
    assert process.stdout.readline() == "ready\n"
    for n in range(ROUNDS):
        assert inject.make_calls(process.pid, [(SYS_GETPID,)]) == [process.pid], n
        time.sleep(random.random() * 0.002)
    said, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
    assert int(said.split()[1]) > 0
