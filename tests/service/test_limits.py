"""A service at the limits of its descriptors and threads, and among connections by the thousand."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.processes import end
from samepage.memory import wire
from samepage.service import sockets
from samepage.service.closing import close_all
from samepage.service.control import Client
from samepage.service.scanner import Scanner
from samepage.service.server import Server
from samepage.service.workers import REST, Workers
from tests.service import fake_agent
from tests.service.fake_agent import NEVER, FakeAgent
from tests.service.test_server import folder, in_child, until

__all__ = ["folder"]

NPAGES = 64
PAGES = fake_agent.some_pages(1, NPAGES)
NOBODY = 65534
socket.getaddrinfo("127.0.0.1", 1)  # imports what that takes, which another user may not read


class Daemon:
    """`samepage daemon` in a process of its own, with limits of its own."""

    def __init__(self, folder: Path, limits: dict[int, int], mib: int = 0) -> None:
        self.path = str(folder / "socket")
        self.said = folder / "said"

        def limit() -> None:
            for what, most in limits.items():
                resource.setrlimit(what, (most, most))

        with self.said.open("w") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "samepage", "daemon", "--socket", self.path], stderr=said, preexec_fn=limit
            )
        until(lambda: Path(self.path).exists())

    def lines(self) -> list[str]:
        return self.said.read_text().splitlines()

    def memory(self) -> int:
        """Bytes it has resident, at most so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) << 10

    def pids(self) -> list[int]:
        with Client(self.path) as client:
            return [row["pid"] for row in client.ask("status").get("processes", [])]


@contextlib.contextmanager
def daemon(folder: Path, limits: dict[int, int]) -> Iterator[Daemon]:
    served = Daemon(folder, limits)
    try:
        yield served
        assert served.process.poll() is None, "it ended"
        assert not [line for line in served.lines() if "Traceback" in line]
    finally:
        end(served.process)


def connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(path)
    sock.settimeout(10)
    return sock


def joined(path: str) -> int:
    """A process of its own that joins, or tries to, again and again."""

    def work() -> None:
        while True:
            with contextlib.suppress(OSError):
                agent = FakeAgent(connect(path), PAGES)
                agent.join()
                agent.sock.settimeout(None)
                agent.serve()
            time.sleep(0.2)

    return in_child(0, work)


@contextlib.contextmanager
def processes(path: str, count: int) -> Iterator[list[int]]:
    pids: list[int] = []
    try:
        for _ in range(count):
            pids.append(joined(path))
        yield pids
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)


def test_more_processes_than_descriptors_are_refused_in_one_line_and_the_others_are_merged(folder: Path) -> None:
    with daemon(folder, {resource.RLIMIT_NOFILE: 256}) as served, processes(served.path, 150) as pids:

        def as_many_as_fit() -> bool:
            with contextlib.suppress(OSError):  # while all come at once, who asks may be turned away, too
                return len(served.pids()) == 112  # (256 - 32) / 2
            return False

        until(as_many_as_fit, 20)

        def all_merged() -> bool:
            with Client(served.path) as client:
                rows = client.ask("status")["processes"]
            return all(row["merged"] == NPAGES for row in rows)

        until(all_merged, 30)
        assert set(served.pids()) < set(pids)
        lines = served.lines()
        refused = [line for line in lines if "may not join: 112 have, and this service may open 256 descr" in line]
        assert len(refused) == 1
        assert len(lines) <= 2, lines  # of those who came all at once some were turned away


def use_up_threads() -> None:
    """All that this user may have."""
    resource.setrlimit(resource.RLIMIT_NPROC, (60, 60))
    with contextlib.suppress(RuntimeError):
        while True:
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    time.sleep(60)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become a user with few threads")
def test_a_service_that_can_start_no_thread_serves_on(folder: Path) -> None:
    user = 61234
    own = folder / "own"
    own.mkdir()
    os.chown(own, user, user)
    path = str(own / "socket")
    said = folder / "said"

    def serve() -> None:
        from samepage.commands.daemon import _serve
        from samepage.service import sockets

        resource.setrlimit(resource.RLIMIT_NPROC, (60, 60))
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        os.setuid(user)
        _serve(sockets.listen(path), path, 16 << 20)

    def ask() -> None:
        idle = [connect(path) for _ in range(30)]
        agent = FakeAgent(connect(path), PAGES)
        agent.join()
        with Client(path) as client:
            for _ in range(20):
                client.ask("stats")
        assert len(idle) == 30

    import samepage.commands.daemon
    import samepage.service.scanner
    import samepage.service.server  # noqa: F401  (another user cannot read what they are imported from)

    said.touch()
    said.chmod(0o666)
    service = in_child(0, serve)
    try:
        until(Path(path).exists)
        hungry = in_child(user, use_up_threads)
        try:
            time.sleep(1)
            asking = in_child(user, ask)
            _, outcome = os.waitpid(asking, 0)
            assert os.waitstatus_to_exitcode(outcome) == 0
            assert os.waitpid(service, os.WNOHANG) == (0, 0)
        finally:
            os.kill(hungry, signal.SIGKILL)
            os.waitpid(hungry, 0)
    finally:
        os.kill(service, signal.SIGKILL)
        os.waitpid(service, 0)
    assert "Traceback" not in said.read_text()


def test_connections_by_the_thousand_cost_neither_memory_nor_the_service_of_others(folder: Path) -> None:
    with daemon(folder, {resource.RLIMIT_NOFILE: 8192}) as served, processes(served.path, 2) as pids:
        until(lambda: set(served.pids()) == set(pids))
        before = served.memory()
        held = [connect(served.path) for _ in range(1000)]  # say nothing
        for _ in range(5000):
            connect(served.path).close()
        flooding = [sock for sock in held if not hung_up(sock)][:100]
        for sock in flooding:
            with contextlib.suppress(OSError):
                for _ in range(200):  # never read
                    sock.send(b'{"op": "stats"}', socket.MSG_DONTWAIT)
        started = time.monotonic()
        for sock in held:
            sock.close()
        until(lambda: set(served.pids()) == set(pids))
        assert time.monotonic() - started < 15
        assert served.memory() - before < 64 << 20


def hung_up(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(1) == b""
    except OSError:
        return False


def lingering() -> int:
    """A socket that makes whoever is the last to close it wait."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sock = socket.create_connection(server.getsockname())
        taken, _ = server.accept()
    taken.detach()  # stays open, and is never read
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 20))
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(b"x" * (1 << 20))
    return sock.detach()


def test_descriptors_that_block_whoever_closes_them_hold_up_nobody_else(folder: Path) -> None:
    def be_hostile() -> None:
        """The answer is there before the question, so that nobody but the service holds the descriptor."""
        for _ in range(12):
            with contextlib.suppress(OSError):
                agent = FakeAgent(connect(path), PAGES)
                fd = lingering()
                agent.join()
                nothing = wire.pack(wire.SCANNED, 0, 0, 0, 0, 0, NEVER, 0, b"")
                socket.send_fds(agent.sock, [wire.encode(wire.Op.SCAN, 1, nothing)], [fd])
                os.close(fd)
                agent.sock.settimeout(1)
                agent.sock.recv(1)
        for _ in range(4):  # and in what is said first
            fd = lingering()
            socket.send_fds(connect(path), [b'{"op": "stats"}'], [fd])
            os.close(fd)
        time.sleep(60)

    limits = {resource.RLIMIT_NOFILE: 1024}
    with daemon(folder, limits) as served:
        path = served.path
        hostile = in_child(NOBODY if os.getuid() == 0 else os.getuid(), be_hostile)
        try:
            time.sleep(1)
            with processes(path, 2) as pids:

                def all_merged() -> bool:
                    with Client(path) as client:
                        rows = {row["pid"]: row["merged"] for row in client.ask("status").get("processes", [])}
                    return [rows.get(pid) for pid in pids] == [NPAGES, NPAGES]

                until(all_merged, 15)
            assert os.waitpid(hostile, os.WNOHANG) == (0, 0), "it failed"
        finally:
            os.kill(hostile, signal.SIGKILL)
            os.waitpid(hostile, 0)


def test_no_thread_waits_for_descriptors_that_came_with_what_is_said_first(folder: Path) -> None:
    with daemon(folder, {}) as served:
        hostile = []
        for first in (b'{"op": "stats"}', b"no packet"):
            for _ in range(12):  # of one user, for whom there are 16 threads
                fd = lingering()
                hostile.append(connect(served.path))
                socket.send_fds(hostile[-1], [first], [fd])
                os.close(fd)
        time.sleep(0.5)
        with Client(served.path, timeout=5) as client:
            assert client.ask("stats")["ok"]
        until(lambda: all(map(hung_up, hostile)))


def test_closing_a_socket_waits_for_nothing_that_was_left_in_it() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fd = lingering()
    socket.send_fds(theirs, [b""], [fd])
    os.close(fd)
    started = time.monotonic()
    assert close_all([ours]) == []
    until(lambda: theirs.recv(1) == b"")
    assert time.monotonic() - started < 2
    theirs.close()


def test_what_guests_ask_for_leaves_the_owner_threads_and_time() -> None:
    workers = Workers(lambda e: None, owner=0)
    done: list[int] = []
    blocked = threading.Event()

    def block() -> None:
        blocked.wait(60)

    for user in range(1, 9):
        for _ in range(20):
            workers.submit(user, block)
    served = threading.Event()
    workers.submit(0, served.set)
    assert served.wait(5)
    blocked.set()

    def spin() -> None:
        ends = time.thread_time() + 0.01
        while time.thread_time() < ends:
            pass
        done.append(1)

    began = time.monotonic()
    for _ in range(50):
        workers.submit(1, spin)
    until(lambda: len(done) == 50, 30)
    assert time.monotonic() - began > 50 * 0.01 * REST / 2
    workers.end()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be other users")
@pytest.mark.parametrize("groups", [[], [61100]])
def test_userfaultfd_is_for_the_group_alone_if_there_is_one(folder: Path, groups: list[int]) -> None:
    path = str(folder / "socket")
    server = Server(sockets.listen(path, everybody=True), Scanner(), userfaultfd_group=61100)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()

    def join() -> None:
        os.setgroups(groups)
        os.setgid(61001)
        os.setuid(61001)
        welcome = FakeAgent(connect(path), PAGES).join()
        os._exit(10 + (welcome.fd >= 0))

    _, outcome = os.waitpid(in_child(0, join), 0)
    server.stop()
    thread.join(10)
    assert os.waitstatus_to_exitcode(outcome) == 10 + (bool(groups) and os.path.exists("/dev/userfaultfd"))


@pytest.mark.parametrize(
    ("had", "user", "welcome"),
    [
        ({1000: 49}, 1000, True),
        ({1000: 50}, 1000, False),
        ({1000: 50, 1001: 24}, 1001, True),
        ({1000: 50, 1001: 25}, 1001, False),  # of another's ids, perhaps
        ({1000: 50, 1001: 25}, 0, True),
        ({1000: 50, 1001: 25, 0: 25}, 0, False),
        ({0: 100}, 1000, False),
    ],
)
def test_all_guests_together_leave_a_quarter_of_the_descriptors_to_the_owner(
    had: dict[int, int], user: int, welcome: bool
) -> None:
    server = Server.__new__(Server)
    server._owner = 0
    assert server._has_room(Counter(had), user, 100) == welcome
