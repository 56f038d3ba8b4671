"""The service among processes that are honest, lie, hang and die: fake agents, each in a process of its own."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from samepage.memory import PAGE_SIZE, wire
from samepage.memory import agent as agent_space
from samepage.service import server as module
from samepage.service import sockets
from samepage.service.control import Client
from samepage.service.scanner import Scanner
from samepage.service.server import Server
from samepage.service.sockets import ControlError
from tests.service import fake_agent
from tests.service.serving import serving

NPAGES = 64
Process = subprocess.Popen[str]
Start = Callable[..., Process]


@pytest.fixture(autouse=True)
def short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_space, "TIMEOUT", 1.0)
    monkeypatch.setattr(module, "TIMEOUT", 1.0)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory that every user can reach, unlike those of pytest, and write to."""
    with tempfile.TemporaryDirectory(prefix="samepage-") as name:
        os.chmod(name, 0o777)
        yield Path(name)


def in_child(uid: int, work: Callable[[], object]) -> int:
    """The pid of a forked process that does `work` as another user; its exit status is 0 if that returns, or 9."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setuid(uid)
            work()
            os._exit(0)
        finally:
            os._exit(9)
    return pid


@pytest.fixture
def path(folder: Path) -> Iterator[str]:
    """Where a service listens."""
    path = str(folder / "socket")
    with serving(path, everybody=True):
        yield path


@pytest.fixture
def start(path: str) -> Iterator[Start]:
    """Starts fake agents that join."""
    processes: list[Process] = []

    def start(seed: int = 1, lie: str = "", npages: int = NPAGES) -> Process:
        arguments = [path, str(seed), str(npages), *([lie] if lie else [])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        command = [sys.executable, fake_agent.__file__, *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "joined\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def status(path: str) -> dict[int, int]:
    """Merged pages by pid."""
    with Client(path) as client:
        return {row["pid"]: row["merged"] for row in client.ask("status").get("processes", [])}


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


def both_merged(path: str, a: Process, b: Process) -> bool:
    merged = status(path)
    return merged.get(a.pid) == NPAGES and merged.get(b.pid) == NPAGES


def test_equal_pages_of_two_processes_are_merged(path: str, start: Start) -> None:
    a, b, other = start(1), start(1), start(2)
    until(lambda: both_merged(path, a, b))
    until(lambda: status(path).get(other.pid) == 0)
    with Client(path) as client:
        counters = client.ask("stats")["counters"]
    assert counters["pages_shared"] == NPAGES
    assert counters["bytes_saved"] == NPAGES * 4096


def test_a_process_that_ends_is_noticed_at_once(path: str, start: Start) -> None:
    a, b = start(1), start(1)
    until(lambda: both_merged(path, a, b))
    b.kill()
    until(lambda: b.pid not in status(path), seconds=2)
    with Client(path) as client:
        assert client.ask("status")["counters"]["pages_sharing"] == 0


@pytest.mark.parametrize("lie", fake_agent.LIES.keys() - {"poor", "slow", "dumb"})
def test_a_lying_peer_is_dropped_and_the_others_are_served(path: str, start: Start, lie: str) -> None:
    liar = start(1, lie)
    a, b = start(1), start(1)
    until(lambda: both_merged(path, a, b), seconds=20)
    if lie not in ("unsealed", "short-segment", "die-merging"):  # who lies about scans never comes so far as to matter
        until(lambda: liar.pid not in status(path))
    assert a.poll() is None
    assert b.poll() is None


def test_a_peer_that_never_says_anything_keeps_nobody_waiting(path: str, start: Start) -> None:
    silent = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(20)]
    for sock in silent:
        sock.connect(path)
    started = time.monotonic()
    a, b = start(1), start(1)
    until(lambda: both_merged(path, a, b))
    assert time.monotonic() - started < 5
    for sock in silent:
        assert select.select([sock], [], [], 5)[0]  # and is hung up on in the end
        assert sock.recv(100) == b""
        sock.close()


def test_a_peer_stuck_before_it_is_ready_keeps_nobody_waiting(path: str, start: Start) -> None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with sock:
        sock.connect(path)
        sock.send(fake_agent.FakeAgent(sock, fake_agent.some_pages(1, 1)).hello())
        assert wire.recv(sock).op == wire.Op.WELCOME
        a, b = start(1), start(1)
        until(lambda: both_merged(path, a, b))
        assert sock.recv(100) == b""
        assert os.getpid() not in status(path)


def test_a_process_that_hangs_keeps_nobody_waiting_who_asks_for_its_row(path: str) -> None:
    """To count its pages merged with the zero page, it would have to be asked."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock, Client(path) as client:
        sock.connect(path)
        agent = fake_agent.FakeAgent(sock, np.zeros((NPAGES, PAGE_SIZE), np.uint8))
        agent.join()
        threading.Thread(target=agent.serve, daemon=True).start()

        def said() -> str:
            return str(client.ask("files", pid=os.getpid())["files"]["ksm_stat"])

        deadline = time.monotonic() + 10
        while f"ksm_zero_pages {NPAGES}" not in said() and time.monotonic() < deadline:
            time.sleep(0.01)
        agent.lies[wire.Op.AREAS] = fake_agent.nothing
        started = time.monotonic()
        assert f"ksm_zero_pages {NPAGES}" in said()
        assert time.monotonic() - started < 0.7


def test_a_process_has_one_mm_slot_the_newest(path: str) -> None:
    first, second = (socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2))
    for sock in (first, second):
        sock.connect(path)
        agent = fake_agent.FakeAgent(sock, fake_agent.some_pages(1, 4))
        agent.join()
        threading.Thread(target=agent.serve, daemon=True).start()
        until(lambda: os.getpid() in status(path))
    until(lambda: first.fileno() == -1)  # its agent saw the hangup
    assert second.fileno() >= 0
    second.shutdown(socket.SHUT_RDWR)


def test_more_connections_of_one_user_than_allowed_are_turned_away(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECTIONS_MAX", 3)
    socks = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(4)]
    for sock in socks:
        sock.settimeout(5)
        sock.connect(path)
    assert select.select(socks, [], [], 0.5)[0] == [socks[3]]
    for sock in socks:
        sock.close()


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become another user")


@needs_root
def test_root_serves_other_users_in_a_domain_of_their_own(path: str, start: Start) -> None:
    a, b = start(1), start(1)

    def join() -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(path)
        agent = fake_agent.FakeAgent(sock, fake_agent.some_pages(1, NPAGES))
        agent.join()
        agent.serve()

    foreign = in_child(65534, join)
    try:
        until(lambda: both_merged(path, a, b) and foreign in status(path))
        with Client(path) as client:
            scans = client.ask("stats")["counters"]["full_scans"]
            until(lambda: client.ask("stats")["counters"]["full_scans"] > scans + 3)
        assert status(path)[foreign] == 0
    finally:
        os.kill(foreign, signal.SIGKILL)
        os.waitpid(foreign, 0)


@needs_root
@pytest.mark.parametrize("packet", ["hello", "control"])
def test_a_service_of_one_user_refuses_others(folder: Path, packet: str) -> None:
    path = str(folder / "socket")

    def serve() -> None:
        scanner = Scanner()
        threading.Thread(target=scanner.run, daemon=True).start()
        Server(sockets.listen(path, everybody=True), scanner).run()

    def be_refused() -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(5)
        until(lambda: sock.connect_ex(path) == 0)
        agent = fake_agent.FakeAgent(sock, fake_agent.some_pages(1, 1))
        sock.send(agent.hello() if packet == "hello" else b'{"op": "set", "knob": "run", "value": "0"}')
        answer = sock.recv(1000)
        assert b"EACCES" in answer if packet == "control" else answer == b""

    service, stranger = in_child(65534, serve), in_child(65533, be_refused)
    _, outcome = os.waitpid(stranger, 0)
    os.kill(service, signal.SIGKILL)
    os.waitpid(service, 0)
    assert os.waitstatus_to_exitcode(outcome) == 0


def test_an_unmerge_over_control_gives_every_page_back(path: str, start: Start) -> None:
    a, b = start(1), start(1)
    until(lambda: both_merged(path, a, b))
    with Client(path) as client:
        client.ask("set", knob="run", value="0")
        *progress, last = client.stream("unmerge", pids=[a.pid])
    assert last["errno"] is None
    assert (last["pages_unmerged"], last["pages_remaining"]) == (NPAGES, 0)
    assert progress[0]["progress"]["pid"] == a.pid
    assert status(path) == {a.pid: 0, b.pid: NPAGES}


def test_an_unmerge_of_a_process_that_has_not_joined_is_refused(path: str) -> None:
    with Client(path) as client, pytest.raises(ControlError, match="has not joined") as raised:
        client.ask("unmerge", pids=[1])
    assert raised.value.errno == errno.ESRCH


def test_knobs_can_be_read_and_set_and_unknown_ones_are_refused(path: str) -> None:
    with Client(path) as client:
        client.ask("set", knob="sleep_millisecs", value="77")
        assert client.ask("get", knob="sleep_millisecs")["knobs"] == {"sleep_millisecs": "77"}
        assert client.ask("get")["knobs"]["sleep_millisecs"] == "77"
        for knob, value, why in (("nonsense", "1", "no knob nonsense"), ("run", "9", "run"), ("run", "x", "run")):
            with pytest.raises(ControlError, match=why) as raised:
                client.ask("set", knob=knob, value=value)
            assert raised.value.errno == errno.EINVAL


def test_run_2_unmerges_everything(path: str, start: Start) -> None:
    a, b = start(1), start(1)
    until(lambda: both_merged(path, a, b))
    with Client(path) as client:
        client.ask("set", knob="run", value="2")
    assert status(path) == {a.pid: 0, b.pid: 0}


def test_merging_on_request_waits_for_no_scan(path: str, start: Start) -> None:
    with Client(path) as client:
        client.ask("set", knob="run", value="0")
    a, b = start(1), start(1)
    with Client(path) as client:
        client.ask("merge", pid=a.pid, vpn=fake_agent.BASE_VPN, npages=NPAGES)
        answer = client.ask("merge", pid=b.pid, vpn=fake_agent.BASE_VPN, npages=NPAGES)
    assert answer["pages_merged"] == NPAGES
    assert status(path) == {a.pid: NPAGES, b.pid: NPAGES}


def test_who_ends_in_the_middle_of_joining_is_no_news_but_who_talks_nonsense_is(
    path: str, capfd: pytest.CaptureFixture[str]
) -> None:
    said = wire.pack(wire.HELLO, wire.MAGIC, wire.VERSION, os.getpid(), os.sysconf("SC_PAGESIZE"), b"ends", b"")
    wrong = wire.pack(wire.HELLO, wire.MAGIC, wire.VERSION + 1, os.getpid(), os.sysconf("SC_PAGESIZE"), b"wrong", b"")
    for hello in (said, wrong):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(path)
            wire.send(sock, wire.Op.HELLO, 0, hello)
            if hello is wrong:
                assert sock.recv(1) == b""  # hung up on
    status(path)
    time.sleep(0.2)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert f"version {wire.VERSION + 1}" in lines[0]


def test_a_process_that_ends_as_it_joins_takes_no_connection_along_that_got_its_number(
    path: str, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    join = Server._join
    met = threading.Event()

    def join_and_dawdle(self: Server, connection: Any, who: Any, domain: Any) -> None:
        join(self, connection, who, domain)
        until(lambda: self._connections.get(connection.fd) not in (None, connection))
        met.set()

    others = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(16)]
    monkeypatch.setattr(Server, "_join", join_and_dawdle)
    process = start()
    until(lambda: bool(status(path)))
    process.kill()
    time.sleep(0.5)
    for other in others:
        other.connect(path)
    assert met.wait(5)
    for other in others:
        other.settimeout(5)
        other.send(b'{"op": "stats"}')
        assert other.recv(1000).startswith(b'{"ok":true')
        other.close()
