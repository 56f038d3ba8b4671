"""Control connections: who may ask what, what nonsense gets, and the client's half."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from samepage.service import control, sockets
from samepage.service.control import Client
from samepage.service.sockets import Caller, ControlError

OWNER, OTHER = 1000, 1001


class FakeScanner:
    """Remembers what it was asked, and answers plainly."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.cancelled = threading.Event()
        self.steps = 3
        self.arrivals: control.Arrivals = queue.SimpleQueue()

    def counters(self, owner: str | None = None) -> dict[str, int]:
        self.asked.append(("counters", owner))
        return {"pages_sharing": 5}

    def by_engine(self, owner: str | None = None) -> dict[str, dict[str, int]]:
        return {"user": {"pages_sharing": 5}}

    def commitments(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        return self.rows(), [{"cgroup": "/", "processes": len(self.rows())}]

    def rows(self) -> list[dict[str, Any]]:
        return [{"pid": pid, "comm": "x" * 16, "owner": str(OTHER if pid % 2 else OWNER)} for pid in range(2500)]

    def files(self) -> dict[str, str]:
        return {"run": "1\n"}

    def row(self, pid: int) -> dict[str, Any] | None:
        return {"ksm_merging_pages": 5, "ksm_mergeable": True} if pid == 7 else None

    def pids(self) -> list[int]:
        return list(range(1, 25000))

    @contextlib.contextmanager
    def introductions(self) -> Iterator[control.Arrivals]:
        yield self.arrivals

    def get(self, knob: str) -> str:
        return {"run": "1"}[knob]

    def knobs(self) -> dict[str, str]:
        return {"run": "1", "sleep_millisecs": "20"}

    def set(self, knob: str, value: str, cancelled: Callable[[], bool]) -> None:
        self.asked.append(("set", knob, value))
        if value == "9":
            raise OSError(errno.EINVAL, "no such value")

    def unmerge(
        self, pids: list[int], progress: Callable[[dict[str, Any]], None], cancelled: Callable[[], bool]
    ) -> dict[str, Any]:
        for step in range(self.steps):
            progress({"pages_unmerged": step})
            if cancelled():
                self.cancelled.set()
                return {"ok": False, "errno": "EINTR", "pages_unmerged": step}
            time.sleep(0.01)
        return {"ok": True, "errno": None, "pages_unmerged": self.steps}

    def merge(self, pid: int, vpn: int, npages: int, owner: str | None = None) -> dict[str, Any]:
        self.asked.append(("merge", pid, vpn, npages, owner))
        return {"pages_merged": npages}


@pytest.fixture
def scanner() -> FakeScanner:
    return FakeScanner()


@pytest.fixture
def path(scanner: FakeScanner, tmp_path: Path) -> Iterator[str]:
    """Where a service listens that serves control connections with the fake scanner."""
    path = str(tmp_path / "socket")
    listener = sockets.listen(path)

    def serve() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            with sock, contextlib.suppress(OSError):
                while data := sock.recv(control.PACKET_MAX + 1):
                    control.handle(sock, data, sockets.peer(sock), scanner, os.getuid())

    threading.Thread(target=serve, daemon=True).start()
    yield path
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def ask(request: bytes, scanner: FakeScanner, uid: int = OWNER, pid: int = 7) -> list[dict[str, Any]]:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with a, b:
        return list(control.answers(request, Caller(pid, uid), scanner, OWNER, a))


@pytest.mark.parametrize(
    "request_",
    [
        b"{",
        b"{}",
        b'{"op": "explode"}',
        b'{"op": "get", "nob": "run"}',
        b'{"op": "set", "knob": "run"}',
        b'{"op": "set", "knob": "run", "value": 1}',
        b'{"op": "merge", "vpn": "x", "npages": 1}',
        b'{"op": "unmerge", "pids": [1, "2"]}',
        b"{\xff}",
        b'{"op": "\xff"}',
        b'{"op": ' + b"[" * 50_000,
        b'{"op": "merge", "vpn": 1, "npages": 100000000000000000000000}',
    ],
)
def test_nonsense_gets_one_clear_refusal(request_: bytes, scanner: FakeScanner) -> None:
    (answer,) = ask(request_, scanner)
    assert answer["ok"] is False
    assert answer["errno"] == "EINVAL"
    assert "\n" not in answer["error"]


@pytest.mark.parametrize("uid", [0, OWNER])
def test_the_owner_and_root_may_do_everything(uid: int, scanner: FakeScanner) -> None:
    for request in (b'{"op": "status"}', b'{"op": "get"}', b'{"op": "set", "knob": "run", "value": "0"}'):
        assert ask(request, scanner, uid)[-1]["ok"]
    assert ask(b'{"op": "unmerge"}', scanner, uid)[-1]["ok"]
    ask(b'{"op": "stats"}', scanner, uid)
    assert scanner.asked[-1] == ("counters", None)


def test_another_user_may_only_see_the_counters_of_their_own_domain(scanner: FakeScanner) -> None:
    requests = [b'{"op": "get"}', b'{"op": "set", "knob": "run", "value": "2"}']
    requests += [b'{"op": "unmerge"}', b'{"op": "merge", "vpn": 1, "npages": 1, "pid": 8}', b'{"op": "files"}']
    requests += [
        b'{"op": "processes"}',
        b'{"op": "introduce"}',
        b'{"op": "write", "file": "run", "data": "2"}',
        b'{"op": "files", "pid": 7}',
    ]
    for request in requests:
        assert ask(request, scanner, OTHER)[-1]["errno"] == "EACCES"
    assert not scanner.asked
    assert ask(b'{"op": "stats"}', scanner, OTHER, pid=os.getpid())[-1]["ok"]
    assert scanner.asked == [("counters", str(OTHER))]


def test_another_user_may_see_the_rows_of_their_own_processes(scanner: FakeScanner) -> None:
    answers = ask(b'{"op": "status"}', scanner, OTHER, pid=os.getpid())
    rows = [row for answer in answers for row in answer.get("processes", [])]
    assert {row["owner"] for row in rows} == {str(OTHER)}
    assert len(rows) == 1250
    assert not any("cgroups" in answer for answer in answers)
    assert scanner.asked == [("counters", str(OTHER))]


def test_another_user_may_have_their_own_process_merged(scanner: FakeScanner) -> None:
    pid = os.getpid()
    assert ask(b'{"op": "merge", "vpn": 1, "npages": 2}', scanner, OTHER, pid)[-1]["pages_merged"] == 2
    assert scanner.asked == [("merge", pid, 1, 2, str(OTHER))]


def test_a_status_longer_than_a_packet_comes_whole(path: str) -> None:
    with Client(path) as client:
        answer = client.ask("status")
    assert [row["pid"] for row in answer["processes"]] == list(range(2500))
    assert answer["counters"] == {"pages_sharing": 5}


def test_the_files_of_sysfs_and_proc_are_told_and_written(path: str, scanner: FakeScanner) -> None:
    with Client(path) as client:
        assert client.ask("files")["files"] == {"run": "1\n"}
        assert client.ask("files", pid=7)["files"]["ksm_merging_pages"] == "5\n"
        assert client.ask("files", pid=8)["files"]["ksm_merging_pages"] == "0\n"
        client.ask("write", file="use_zero_pages", data="yes\n")
        assert scanner.asked == [("set", "use_zero_pages", "1")]
        with pytest.raises(ControlError, match="not a number") as raised:
            client.ask("write", file="sleep_millisecs", data="0x10")
        assert raised.value.errno == errno.EINVAL


def test_a_list_of_processes_is_cut_to_a_packet(path: str) -> None:
    with Client(path) as client:
        assert client.ask("processes")["pids"] == list(range(1, control.PIDS_MAX + 1))


def test_who_joins_is_introduced_and_waits_until_that_was_taken_in(path: str, scanner: FakeScanner) -> None:
    with Client(path) as client:
        packets = client.stream("introduce")
        assert next(packets) == {"introducing": True}
        for pid in (5, 6):
            known = threading.Event()
            scanner.arrivals.put((pid, known))
            assert next(packets) == {"joined": pid}
            assert not known.wait(0.1)
            client.acknowledge()
            assert known.wait(60)


def test_what_the_service_refuses_is_raised_with_its_errno(path: str) -> None:
    with Client(path) as client:
        with pytest.raises(ControlError, match="no such value") as raised:
            client.ask("set", knob="run", value="9")
        assert raised.value.errno == errno.EINVAL
        assert client.ask("get", knob="run")["knobs"] == {"run": "1"}


def test_an_unmerge_tells_its_progress_and_then_the_outcome(path: str) -> None:
    with Client(path) as client:
        packets = list(client.stream("unmerge", pids=[]))
    assert [p["progress"]["pages_unmerged"] for p in packets[:-1]] == [0, 1, 2]
    assert packets[-1] == {"ok": True, "errno": None, "pages_unmerged": 3}


def test_an_unmerge_ends_when_its_client_goes(path: str, scanner: FakeScanner) -> None:
    scanner.steps = 1000
    client = Client(path)
    next(iter(client.stream("unmerge", pids=[])))
    client.close()
    assert scanner.cancelled.wait(5)


def test_a_cancelled_unmerge_still_tells_how_far_it_came(path: str, scanner: FakeScanner) -> None:
    scanner.steps = 1000
    with Client(path) as client:
        packets = client.stream("unmerge", pids=[])
        next(packets)
        client.cancel()
        *_, last = packets
    assert last["errno"] == "EINTR"
    assert last["pages_unmerged"] < 1000


def test_a_client_that_sends_too_much_is_hung_up_on(path: str) -> None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with sock:
        sock.connect(path)
        sock.send(b'{"op": "get"}')
        sock.recv(1 << 17)
        sock.send(b"{" + b" " * control.PACKET_MAX)
        assert sock.recv(100) == b""


def test_no_service_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match="start `samepage daemon`") as raised:
        Client(str(tmp_path / "nothing"))
    assert raised.value.errno == errno.ENOENT


def test_a_socket_is_the_owners_alone_unless_it_is_for_everybody(tmp_path: Path) -> None:
    with sockets.listen(str(tmp_path / "mine")), sockets.listen(str(tmp_path / "ours"), everybody=True):
        assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o600
        assert (tmp_path / "ours").stat().st_mode & 0o777 == 0o666


def test_a_stale_socket_is_replaced_a_live_one_and_a_file_are_not(tmp_path: Path, path: str) -> None:
    stale = str(tmp_path / "stale")
    sockets.listen(stale).close()
    sockets.listen(stale).close()
    with pytest.raises(ControlError, match="already"):
        sockets.listen(path)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ControlError, match="no socket"):
        sockets.listen(str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "precious"


def test_a_service_that_goes_before_it_answers_is_a_clear_error(path: str) -> None:
    with Client(path) as client:
        client.ask("get")
        client.cancel()
        with pytest.raises(ControlError, match="ended before it answered") as raised:
            client.ask("get")
    assert not isinstance(raised.value, BrokenPipeError)  # which would mean our own output


def late(path: str, monkeypatch: pytest.MonkeyPatch, waits: float) -> Any:
    """What a client with half a second of patience gets from a service that answers after two, and that waited for a
    CPU for a part `waits` of the time."""
    began, real = time.monotonic(), control.answers

    def slow(*arguments: Any) -> Iterator[dict[str, Any]]:
        time.sleep(2)
        yield from real(*arguments)

    monkeypatch.setattr(control, "answers", slow)
    monkeypatch.setattr(control, "waited_for_cpu", lambda pid: (time.monotonic() - began) * waits)
    with Client(path, timeout=0.5) as client:
        return client.ask("stats")["counters"]


def test_a_service_that_waits_for_a_cpu_is_waited_for(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert late(path, monkeypatch, 0.9) == {"pages_sharing": 5}


def test_a_service_that_could_run_and_does_not_answer_is_a_clear_error(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ControlError, match="does not answer") as raised:
        late(path, monkeypatch, 0.1)
    assert raised.value.errno == errno.ETIMEDOUT


def test_waiting_for_a_cpu_is_seen_from_outside() -> None:
    core = str(min(os.sched_getaffinity(0)))
    busy = "import time; end = time.monotonic() + 1\nwhile time.monotonic() < end: pass"
    command = ["nice", "-n", "19", "taskset", "-c", core, sys.executable, "-c", busy]
    both = [subprocess.Popen(command) for _ in range(2)]
    time.sleep(0.9)
    assert sum(control.waited_for_cpu(process.pid) for process in both) > 0.2
    assert [process.wait() for process in both] == [0, 0]
    assert control.waited_for_cpu(both[0].pid) == 0
