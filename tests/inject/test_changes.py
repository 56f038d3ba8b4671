"""A process changes while it is looked at: it executes another program, puts itself under a filter, or ends and another
one has its pid. Then no call is made in its name, and it goes on as it would have."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.processes import wait_until
from samepage import inject
from samepage.inject import Error, InjectError
from samepage.kernel.attach import attach
from samepage.kernel.target import TargetError
from tests.agent.preload import compile_c

HERE = Path(__file__).parent
SYS_GETPID = 39

Run = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def run() -> Iterator[Run]:
    started: list[subprocess.Popen[str]] = []

    def run(*command: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))
        out = started[-1].stdout
        assert out is not None
        assert out.readline() == "ready\n"
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def held_off(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each exec of it has the same code at the same addresses."""
    flags = ("-static", "-no-pie", "-pthread")
    return compile_c(HERE / "held_off.c", tmp_path_factory.mktemp("changes") / "held_off", *flags)


def waits(process: subprocess.Popen[str]) -> subprocess.Popen[str]:
    """In epoll_wait(2), for a time: so samepage waits, too."""
    wait_until(lambda: Path(f"/proc/{process.pid}/syscall").read_text().startswith("232 "), "waiting", 10)
    return process


def test_a_process_under_a_filter_makes_no_call_whoever_asks(run: Run, held_off: Path) -> None:
    process = run(str(held_off), "strict")
    time.sleep(0.1)
    with pytest.raises(InjectError) as refused:
        inject.make_calls(process.pid, [(SYS_GETPID,)])
    assert refused.value.error == Error.FILTERED
    process.communicate("x", timeout=10)
    assert process.returncode == 0


def test_a_process_that_puts_itself_under_a_filter_meanwhile_is_left_alone(run: Run, held_off: Path) -> None:
    """By another thread, for all. The call is one that it would be killed for."""
    for _ in range(3):
        process = waits(run(str(held_off), "filtered", "later"))
        with pytest.raises(TargetError, match="it is under seccomp"):
            attach(process.pid)
        process.communicate("x", timeout=10)
        assert process.returncode == 0


def test_a_process_that_executes_another_program_meanwhile_is_left_alone(run: Run, held_off: Path) -> None:
    for _ in range(3):
        process = waits(run(str(held_off), "another program", "later"))
        with pytest.raises(TargetError, match="executed another program"):
            attach(process.pid)
        assert "ksm_merge_any: no" in Path(f"/proc/{process.pid}/ksm_stat").read_text()
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.communicate("x", timeout=10)
        assert process.returncode == 0


def test_who_has_the_pid_now_is_not_taken_for_who_had_it(run: Run, held_off: Path) -> None:
    gone, process = run(str(held_off)), run(str(held_off))
    pidfd = os.pidfd_open(gone.pid)
    try:
        gone.kill()
        gone.wait()
        with pytest.raises(InjectError) as refused:
            inject.make_calls(process.pid, [(SYS_GETPID,)], pidfd)
        assert refused.value.error == Error.GONE
    finally:
        os.close(pidfd)
    process.communicate("x", timeout=10)
    assert process.returncode == 0


@pytest.mark.parametrize("thread", ["first", "other"])
def test_a_program_that_executes_itself_again_and_again_is_held_between_two_times(
    run: Run, tmp_path: Path, thread: str
) -> None:
    """From its first thread, or from another, which takes the place of the first: also of one that is held."""
    program = compile_c(HERE / "executes.c", tmp_path / "executes", "-pthread")
    process = run(str(program), thread, "1")
    answers, refused, until = [], set(), time.monotonic() + 4
    while time.monotonic() < until:
        try:
            answers += inject.make_calls(process.pid, [(SYS_GETPID,)] * 3)
        except InjectError as e:
            refused.add(e.error)
        assert process.poll() is None
    assert set(answers) == {process.pid}
    assert refused <= {Error.GONE, Error.BUSY}
    said, _ = process.communicate("x", timeout=20)
    assert process.returncode == 0
    assert int(said.split()[-1]) > 10
