"""What is read of /proc/PID by number is told only of the process that joined, in the program that it joined in."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from samepage.memory import AddressSpaceGone, wire
from samepage.memory.agent import AgentAddressSpace
from samepage.memory.handshake import Terms
from samepage.process.halt import STOPPED
from samepage.process.identity import identify
from tests.service.fake_agent import FakeAgent, some_pages
from tests.service.test_server import folder, until

__all__ = ["folder"]

NOBODY = 65534
SYS_CLONE3 = 435

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root: for another user's processes, and to choose pids")

WAITING = (
    "import os, sys; os.setresgid(*[int(sys.argv[1])] * 3); os.setresuid(*[int(sys.argv[1])] * 3); print(flush=True)"
)


class Joined:
    """A process of another user, whose connection a fake agent of ours has."""

    def __init__(self, then: str) -> None:
        command = [sys.executable, "-c", f"{WAITING}; input(); {then}", str(NOBODY)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.process.stdout.readline()
        self.pid = self.process.pid
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        agent = FakeAgent(theirs, some_pages(1, 8))

        def serve() -> None:
            agent.join()
            agent.serve()

        threading.Thread(target=serve, daemon=True).start()
        who = identify(self.pid)
        self.space = AgentAddressSpace.welcome(ours, wire.recv(ours), self.pid, who.domain, Terms(), identity=who)

    def go_on(self) -> None:
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)

    def end(self) -> None:
        self.space.close()
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def executed(folder: Path) -> Iterator[Joined]:
    """It executed a set-user-ID program of root's, which has stopped."""
    program = folder / "sleep"
    shutil.copy(shutil.which("sleep") or "", program)
    program.chmod(0o4755)
    joined = Joined(f"os.execv({str(program)!r}, ['sleep', '60'])")
    try:
        joined.go_on()
        until(lambda: identify(joined.pid).uids[1] == 0)
        _stop(joined.pid)
        yield joined
    finally:
        joined.end()


@contextlib.contextmanager
def recycled(folder: Path) -> Iterator[Joined]:
    """It ended, and a process of root's that has stopped has its number."""
    joined = Joined("pass")
    joined.go_on()
    joined.process.communicate()
    child = _fork_as(joined.pid)
    try:
        _stop(child)
        yield joined
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        joined.space.close()


def _stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    until(lambda: b"(stopped)" in Path(f"/proc/{pid}/status").read_bytes())


def _fork_as(pid: int) -> int:
    """A process with that number, which does nothing."""
    numbers = (ctypes.c_int * 1)(pid)
    arguments = (ctypes.c_uint64 * 10)(0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, ctypes.addressof(numbers), 1)
    child: int = ctypes.CDLL(None, use_errno=True).syscall(SYS_CLONE3, arguments, ctypes.sizeof(arguments))
    if child == 0:
        while True:
            signal.pause()
    assert child == pid, os.strerror(ctypes.get_errno())
    return child


@pytest.fixture(params=[executed, recycled], ids=lambda change: change.__name__)
def other(request: pytest.FixtureRequest, folder: Path) -> Iterator[Joined]:
    """A process that is not what joined any more. The connection lives on, and who has it answers."""
    change: Callable[[Path], contextlib.AbstractContextManager[Joined]] = request.param
    with change(folder) as joined:
        yield joined


def test_nobody_is_told_that_another_has_stopped(other: Joined) -> None:
    assert not other.space.is_there()
    assert other.space.halted() == ""


def in_stack(joined: Joined) -> int:
    """How many pages it says are in the last MiB of its stack."""
    with open(f"/proc/{joined.pid}/maps") as maps:
        end = next(int(line.split()[0].split("-")[1], 16) for line in maps if "[stack]" in line)
    return len(joined.space.present(end // 4096 - 256, 256))


def test_nobody_is_told_what_another_has_in_memory(other: Joined) -> None:
    assert in_stack(other) == 0
    assert other.space.gone


def test_nobody_is_told_how_much_memory_another_has(other: Joined) -> None:
    with pytest.raises(AddressSpaceGone):
        other.space.pages_max()


def test_nobody_is_told_the_memory_cgroup_of_another(other: Joined) -> None:
    with pytest.raises(AddressSpaceGone):
        other.space.headroom()


def test_of_the_process_that_joined_all_is_told() -> None:
    joined = Joined("pass")
    try:
        assert joined.space.headroom()[0] != ""
        assert joined.space.pages_max() > 0
        assert in_stack(joined) > 0
        os.kill(joined.pid, signal.SIGSTOP)
        until(lambda: joined.space.halted() == STOPPED)
    finally:
        joined.end()
