"""The agent's thread begins and ends wherever a program may be, holds nobody up, and needs nothing of the program's."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from samepage.memory import ScanFlag, wire
from samepage.memory.wire import Op
from tests.agent.preload import Preload, compile_c, start_merge_all

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(compile_c(HERE / "start.c", tmp_path_factory.mktemp("start") / "start", "-pthread", "-D_DEFAULT_SOURCE"))


def test_the_library_imports_nothing_that_a_program_may_replace_or_be_inside_of(preload: Preload) -> None:
    """dlsym and secure_getenv are for the constructor; all else that has a name of libc's is in system.c."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", str(preload.library)], capture_output=True, check=True)
    names = {line.split()[-1].split(b"@")[0].decode() for line in listed.stdout.splitlines() if b" U " in line}
    assert names <= {"__errno_location", "dlsym", "secure_getenv"}


def test_a_program_may_map_all_its_memory_under_its_allocators_lock(preload: Preload, tmp_path: Path) -> None:
    program = compile_c(HERE / "start.c", tmp_path / "start", "-pthread", "-DOWN_MALLOC", "-fno-builtin")
    assert preload.run([str(program), "inside-malloc"], socket="/nowhere") == "agent 1\n"


@pytest.mark.parametrize("name", ["jemalloc", "tcmalloc_minimal", "mimalloc"])
def test_other_allocators_start_with_all_memory_mergeable(preload: Preload, start: str, name: str) -> None:
    found = sorted(Path("/usr/lib/x86_64-linux-gnu").glob(f"lib{name}.so*"))
    if not found:
        pytest.skip(f"needs lib{name}")
    for order in (f"{preload.library}:{found[0]}", f"{found[0]}:{preload.library}"):
        command = ["env", f"LD_PRELOAD={order}", "SAMEPAGE_SOCKET=/nowhere", start, "inside-malloc"]
        assert preload.run(command, bare=True) == "agent 1\n"


def test_addresses_that_a_program_of_one_thread_gave_back_stay_free(tmp_path: Path) -> None:
    program = compile_c(HERE / "gap.c", tmp_path / "gap")
    for _ in range(3):
        done = subprocess.run(["samepage", "run", "--", str(program)], stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 0, done.stderr


Serve = Callable[[socket.socket], None]


def mute(listener: socket.socket) -> None:
    """It never accepts."""


def full(listener: socket.socket) -> None:
    """It never accepts, and nobody more may wait for that."""
    listener.listen(0)
    with contextlib.suppress(BlockingIOError):
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
            KEPT.append(sock)
            sock.connect(listener.getsockname())


def deaf(listener: socket.socket) -> None:
    """It accepts, and never reads."""
    while True:
        KEPT.append(listener.accept()[0])


def speechless(listener: socket.socket) -> None:
    """It welcomes, and never asks."""
    while True:
        sock = listener.accept()[0]
        KEPT.append(sock)
        wire.send(sock, Op.WELCOME, wire.recv(sock).seq, wire.pack(wire.WELCOME, wire.VERSION, 0, 0, 64, 0))


def curious(listener: socket.socket) -> None:
    """It asks for as much as it can, and never reads an answer."""
    while True:
        sock = listener.accept()[0]
        KEPT.append(sock)
        wire.send(sock, Op.WELCOME, wire.recv(sock).seq, wire.pack(wire.WELCOME, wire.VERSION, 0, 0, 64, 0))
        sock.settimeout(0.2)
        with contextlib.suppress(OSError):
            while True:
                body = wire.pack(wire.SCAN, 0, 1 << 20, 1 << 52, ScanFlag.ALL, 0)
                wire.send(sock, Op.SCAN, 1, body)


def stuttering(listener: socket.socket) -> None:
    """What it says breaks off in the middle."""
    while True:
        sock = listener.accept()[0]
        KEPT.append(sock)
        wire.recv(sock)
        sock.send(wire.pack(wire.HDR, Op.WELCOME, 0, 0, wire.WELCOME.itemsize) + b"half")


KEPT: list[socket.socket] = []
"""Connections that nobody closes before the test is over."""


@contextmanager
def listening(path: Path, serve: Serve) -> Iterator[None]:
    def run() -> None:
        with contextlib.suppress(OSError, wire.WireError):  # it is over
            serve(listener)

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen(1)
        thread = threading.Thread(target=run)
        thread.start()
        if serve is full:
            thread.join()
        yield
        listener.shutdown(socket.SHUT_RDWR)
        for sock in KEPT:
            sock.close()
        thread.join()
        KEPT.clear()


SILENT = "unmerge 0\nmerge any 0\nmerge none 0\nsetns -1 Bad file descriptor\nunshare 0\nseccomp 1\nin time 1\nidle 1\n"


@pytest.mark.parametrize("serve", [mute, full, deaf, speechless, curious, stuttering], ids=lambda serve: serve.__name__)
def test_a_service_that_never_answers_holds_nobody_up(
    preload: Preload, start: str, tmp_path: Path, serve: Serve
) -> None:
    """Neither whoever unmerges, all or some, nor who must be alone in the process, nor who ends it."""
    with listening(tmp_path / "socket", serve):
        assert preload.run([start, "silent-service"], socket=str(tmp_path / "socket")) == SILENT


def test_a_service_that_is_stopped_holds_nobody_up(preload: Preload, start: str, tmp_path: Path) -> None:
    """Stopped again and again, for a moment in which it has asked something is as good as one in which it has not."""
    service = start_merge_all(tmp_path / "socket")
    stopper = subprocess.Popen(
        ["sh", "-c", f"while :; do kill -STOP {service.pid}; sleep 0.2; kill -CONT {service.pid}; sleep 0.01; done"]
    )
    try:
        for _ in range(3):
            assert preload.run([start, "silent-service"], socket=str(tmp_path / "socket")) == SILENT
    finally:
        for process in (stopper, service):
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become another user")
def test_a_process_that_changed_its_user_is_not_held_up_either(preload: Preload, start: str) -> None:
    assert preload.run([start, "as-nobody"], merged=True) == "merged before: unmerge 0, whole 1\n" + SILENT


def test_a_process_whose_last_thread_ends_by_an_inline_system_call_ends(preload: Preload, start: str) -> None:
    assert preload.run([start, "inline-exit"], merged=True) == "exit\n"


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, for SCHED_FIFO")
def test_the_thread_runs_as_the_process_was_started(preload: Preload, start: str) -> None:
    """And not as the thread that allocated first: of real time, pinned, nice, with another memory policy. But it is
    nicer, as ksmd is."""
    expected = f"agent 1\npolicy 0\nsame CPUs 1\nnice {min(max(os.nice(0), 0) + 5, 19)}\nI/O priority 0\n"
    assert preload.run([start, "settings"], socket="/nowhere") == expected


def test_it_begins_in_a_signal_handler_and_not_in_a_child_that_shares_memory(preload: Preload, start: str) -> None:
    assert preload.run([start, "odd-places"], socket="/nowhere") == (
        "vfork 0\nhandler 1 agent 1\nvfork 0 agent 1\nfork 0\n"
    )


def test_calls_survive_the_end_of_the_thread_they_were_for(preload: Preload, start: str) -> None:
    assert preload.run([start, "calls-and-ends"], merged=True) == "calls 1\n"


def test_a_program_at_its_limit_gets_what_the_agent_has_mapped(preload: Preload, start: str) -> None:
    assert preload.run([start, "fills-its-limit"], merged=True) == "all but little 1\n"


@pytest.mark.parametrize("how", ["maps-to-its-limit", "grows-to-its-limit"])
def test_a_program_at_its_limit_may_map_what_the_agent_has_mapped(preload: Preload, start: str, how: str) -> None:
    assert preload.run([start, how], merged=True) == "too much 1\nall but little 1\n"


def test_it_takes_no_signal_from_a_program_that_waits_for_it(preload: Preload, start: str) -> None:
    assert preload.run([start, "waits-for-signals"], merged=True) == "lost 0\n"


def test_a_process_whose_main_thread_ended_is_served_as_before(preload: Preload, start: str) -> None:
    lines = ["mprotect -1", "discard 0 leaves 0", "unmerge 0", "whole 1"]
    assert preload.run([start, "leaderless"], merged=True).splitlines() == lines


def test_a_process_that_inherits_to_merge_all_has_no_thread_before_it_is_worth_one(
    preload: Preload, start: str
) -> None:
    """Some look whether they are alone: Chromium's zygote. Nor have its children."""
    assert preload.run([start, "small"], socket="/nowhere") == "4 MiB: 0 0\n20 MiB: 1\na child: 1\n"
