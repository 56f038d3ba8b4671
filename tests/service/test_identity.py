"""A process that is not who it was when it joined: nothing of it is merged, and nothing is told of it."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from samepage.memory import PAGE_SIZE, AddressSpaceGone
from samepage.memory.agent import AgentAddressSpace
from samepage.process.identity import OWN_USERNS, identify
from samepage.process.merge_domain import MergeDomain
from samepage.service.control import Client
from tests.service import fake_agent
from tests.service.fake_agent import FakeAgent
from tests.service.test_same_number import _fork_as as fork_as
from tests.service.test_server import folder, in_child, path, short_timeout, status, until

__all__ = ["folder", "path", "short_timeout"]

NPAGES = 64
PAGES = fake_agent.some_pages(1, NPAGES)  # made here, since another user cannot import what that takes
NOBODY = 65534
CLONE_NEWUSER = 0x10000000

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become another user")


@contextlib.contextmanager
def process(work: Callable[[], object], uid: int = 0) -> Iterator[int]:
    pid = in_child(uid, work)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def agent(path: str, pages: np.ndarray | None = None) -> FakeAgent:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(path)
    joined = FakeAgent(sock, PAGES if pages is None else pages)
    joined.join()
    return joined


def served(path: str, before: Callable[[], object] = lambda: None, after: Callable[[], object] = lambda: None) -> None:
    """What a process does: `before` it joins, and `after`."""
    before()
    joined = agent(path)
    after()
    joined.serve()
    time.sleep(60)


def joined(client: Client, path: str) -> set[int]:
    client.ask("set", knob="sleep_millisecs", value="20")  # while `run` is 0, only then are the rows made anew
    # Not what is available to them: to ask for that finds out who changed.
    return {row["pid"] for row in client.ask("status", brief=True).get("processes", [])}


def become_nobody_by_the_kernel_alone() -> None:
    assert ctypes.CDLL(None).syscall(117, NOBODY, NOBODY, NOBODY) == 0  # setresuid


def unshare_users() -> None:
    assert ctypes.CDLL(None).unshare(CLONE_NEWUSER) == 0


def test_a_process_that_became_another_user_is_dropped_before_anything_is_merged(
    path: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with Client(path) as client:
        client.ask("set", knob="run", value="0")
        changing = process(lambda: served(path, after=become_nobody_by_the_kernel_alone))
        with process(lambda: served(path)) as a, process(lambda: served(path)) as b, changing as changed:
            until(lambda: {a, b, changed} <= joined(client, path))
            until(lambda: identify(changed).uids == (NOBODY,) * 4)
            client.ask("set", knob="run", value="1")
            until(lambda: status(path).get(a) == status(path).get(b) == NPAGES)
            assert changed not in status(path)
            assert client.ask("stats")["counters"]["pages_sharing"] == NPAGES
    assert "it changed its user ids" in capfd.readouterr().err


def test_of_one_user_two_user_namespaces_have_nothing_in_common(path: str) -> None:
    elsewhere = process(lambda: served(path, before=unshare_users))
    with process(lambda: served(path)) as a, process(lambda: served(path)) as b, elsewhere as inside:
        until(lambda: status(path).get(a) == status(path).get(b) == NPAGES and inside in status(path))
        with Client(path) as client:
            scans = client.ask("stats")["counters"]["full_scans"]
            until(lambda: client.ask("stats")["counters"]["full_scans"] > scans + 3)
        assert status(path)[inside] == 0
        assert identify(inside).userns != OWN_USERNS
        assert identify(inside).domain.user == 0


def test_users_without_an_id_in_the_user_namespace_of_the_service_may_not_join(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """There they all look like one user, whose pages would be merged."""
    path = str(folder / "inside")
    ready, mapped = os.pipe(), os.pipe()

    def serve() -> None:
        from samepage.commands.daemon import _serve
        from samepage.service import sockets

        unshare_users()
        os.write(ready[1], b"x")
        os.read(mapped[0], 1)
        _serve(sockets.listen(path, everybody=True), path, 16 << 20)

    def other() -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(path)
        with contextlib.suppress(OSError):
            FakeAgent(sock, PAGES).join()
            os._exit(1)

    with process(serve) as service:
        os.read(ready[0], 1)
        Path(f"/proc/{service}/uid_map").write_text("0 0 1")
        os.write(mapped[1], b"x")
        until(Path(path).exists)
        for user in (61001, 61002):
            _, outcome = os.waitpid(in_child(user, other), 0)
            assert os.waitstatus_to_exitcode(outcome) == 0, "it was welcome"
        with process(lambda: served(path)) as mapped_too:
            until(lambda: mapped_too in status(path))
    for fd in (*ready, *mapped):
        os.close(fd)
    assert "no id in this user namespace" in capfd.readouterr().err


def test_a_process_whose_group_ids_are_not_all_one_may_not_join(path: str, capfd: pytest.CaptureFixture[str]) -> None:
    """As after an exec of a set-group-ID program, by which others keep the connection."""
    mixed = process(lambda: served(path, before=lambda: os.setresgid(0, NOBODY, NOBODY)))
    with mixed as pid, process(lambda: served(path)) as other:
        until(lambda: other in status(path))
        until(lambda: "may not join" in capfd.readouterr().err)
        assert pid not in status(path)


def test_a_process_that_entered_another_user_namespace_is_dropped(path: str) -> None:
    with process(lambda: served(path, after=unshare_users)) as changed, process(lambda: served(path)) as other:
        until(lambda: other in status(path))
        until(lambda: changed not in status(path))
        assert other in status(path)


def test_a_process_whose_ids_are_not_all_one_may_not_join(path: str, capfd: pytest.CaptureFixture[str]) -> None:
    mixed = process(lambda: served(path, before=lambda: os.setresuid(0, NOBODY, 0)))
    with mixed as pid, process(lambda: served(path)) as other:
        until(lambda: other in status(path))
        until(lambda: "may not join" in capfd.readouterr().err)
        assert pid not in status(path)


def test_nothing_is_told_of_a_program_executed_by_a_process_whose_connection_lives_on(path: str) -> None:
    """The oracle: claim zero pages, execute a program of another user's, and see from the count which are there."""
    ours, theirs = os.pipe()

    def work() -> None:
        area = mmap.mmap(-1, NPAGES * PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        area.madvise(mmap.MADV_NOHUGEPAGE)
        here = np.frombuffer(area, np.uint8).ctypes.data // PAGE_SIZE
        joined = agent(path, np.zeros((NPAGES, PAGE_SIZE), np.uint8))
        fake_agent.BASE_VPN = here
        joined.areas["vpn"] = here
        child = os.fork()
        if child == 0:  # which keeps the connection
            os.write(theirs, os.getpid().to_bytes(4, "little"))
            joined.serve()
            time.sleep(60)
        signal.pause()

    def on_usr1(*_: object) -> None:
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(60)"])

    def with_handler() -> None:
        signal.signal(signal.SIGUSR1, on_usr1)
        work()

    def said(client: Client, pid: int) -> str:
        return str(client.ask("files", pid=pid)["files"].get("ksm_stat", ""))

    with process(with_handler) as pid, Client(path) as client:
        child = int.from_bytes(os.read(ours, 4), "little")
        try:
            until(lambda: f"ksm_zero_pages {NPAGES}" in said(client, pid))
            before = identify(pid)
            os.kill(pid, signal.SIGUSR1)
            until(lambda: identify(pid).stack != before.stack)
            until(lambda: pid not in status(path) or not said(client, pid), seconds=5)
        finally:
            os.kill(child, signal.SIGKILL)
            os.close(ours)
            os.close(theirs)


@contextlib.contextmanager
def inherited(path: str, clone: int) -> Iterator[tuple[socket.socket, int]]:
    """A connection whose process, of another user namespace, has ended, and the process that has its number by now."""
    ours, theirs = socket.socketpair()

    def work() -> None:
        unshare_users()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(path)
            socket.send_fds(theirs, [b"x"], [sock.fileno()])

    ended = in_child(clone, work)
    _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    os.waitpid(ended, 0)
    time.sleep(0.05)  # so that the next one did not start in the same hundredth of a second
    with socket.socket(fileno=fds[0]) as sock, ours, theirs:
        other = fork_as(ended)
        try:
            yield sock, other
        finally:
            os.kill(other, signal.SIGKILL)
            os.waitpid(other, 0)


@pytest.mark.parametrize("kernel", ["tells", "does not tell"])
def test_the_number_of_a_process_that_has_ended_lets_nobody_join(
    path: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who passed its connection on would let others into the user namespace of whoever has the number next."""
    if kernel == "does not tell":  # before Linux 6.5
        monkeypatch.setattr("samepage.process.identity.SO_PEERPIDFD", 9999)
    with process(lambda: served(path)) as victim, inherited(path, 0) as (sock, other):
        until(lambda: victim in status(path))
        assert identify(other).userns == OWN_USERNS
        sock.settimeout(1)  # who has the number was forked here, and keeps it open
        with pytest.raises(OSError, match="timed out"):
            FakeAgent(sock, PAGES).join()
        assert set(status(path)) == {victim}


def test_nobody_is_told_what_is_merged_in_a_process_that_has_the_number_of_one_that_has_ended(path: str) -> None:
    with inherited(path, NOBODY) as (sock, _):
        for request in (b'{"op": "stats"}', b'{"op": "status"}', b'{"op": "merge", "vpn": 0, "npages": 1}'):
            sock.send(request)
            assert b"ESRCH" in sock.recv(1000)


def test_each_process_that_hides_its_user_namespace_has_a_domain_to_itself() -> None:
    """Also those that were started within the same hundredth of a second."""
    hidden = replace(identify(os.getpid()), userns=0)
    others = [replace(hidden, pid=pid) for pid in (1, hidden.pid + 1, (1 << 22) - 1)]
    assert len({who.domain for who in (hidden, *others)}) == 4
    assert {who.domain.user for who in (hidden, *others)} == {os.getuid()}
    assert all(who.domain.userns < 0xEFFFFFF8 for who in others)  # the least inode of a namespace


def test_the_identity_of_a_process_that_ended_is_an_error() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    with pytest.raises(OSError, match="No such"):
        identify(ended.pid)
    assert identify(os.getpid()).differs(identify(os.getppid())) != ""
    assert Path(f"/proc/{os.getpid()}/ns/user").stat().st_ino == OWN_USERNS


def test_a_process_that_ends_has_not_changed_who_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells nobody the user namespace of a process that has just ended."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    ready = {"swap": 0, "tracking": 1, "zero_checksum": 0, "unnamed": 0}
    space = AgentAddressSpace(ours, child.pid, MergeDomain(0), "ended", ready, identify(child.pid))
    try:
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        monkeypatch.setattr("samepage.process.identity._namespace", lambda kind, folder: 0)
        with pytest.raises(AddressSpaceGone) as gone:
            space.verify()
        assert gone.value.ended
    finally:
        child.wait()
        theirs.close()
