"""Pages that were merged and then written become memory like any other, but for those that somebody holds."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from samepage.memory import AREA, EXTENT, PageStatus, wire
from samepage.memory.agent import AgentAddressSpace
from samepage.memory.handshake import Terms
from samepage.memory.wire import Swap
from samepage.process.merge_domain import MergeDomain
from tests.agent.asked import HUGE, Process
from tests.agent.preload import Preload, compile_c

HERE = Path(__file__).parent
PTRACE_SEIZE, PTRACE_DETACH = 0x4206, 17
PAGES, PINNED, LENGTH = 512, 200, 16
"""As in pinned.c."""


def look(space: AgentAddressSpace) -> None:
    """At everything, once."""
    vpn = 0
    while vpn := space.scan(vpn, 1 << 20).next_vpn:
        pass


class Pinned:
    """pinned.c, whose service is the test."""

    def __init__(self, preload: Preload, directory: Path, slow: Path) -> None:
        program = compile_c(HERE / "pinned.c", directory / "pinned", "-pthread")
        path = str(directory / "socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(path)
            listener.listen()
            self.process = subprocess.Popen(
                [str(program), str(directory / "file"), str(slow)],
                env=os.environ | {"LD_PRELOAD": str(preload.library), "SAMEPAGE_SOCKET": path},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self.first = int(self.line()) // 4096
            listener.settimeout(60)
            sock, _ = listener.accept()
        sock.settimeout(60)
        domain = MergeDomain(os.getuid())
        self.space = AgentAddressSpace.welcome(sock, wire.recv(sock), self.process.pid, domain, Terms(reserve=0))
        if self.space.swap != Swap.MOVE:
            pytest.skip("no UFFDIO_MOVE here")

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def tell(self, what: str) -> int:
        self.start(what)
        return int(self.line())

    def start(self, what: str) -> None:
        print(what, file=self.process.stdin, flush=True)

    def make_islands(self) -> None:
        """Have all pages merged, and then written."""
        look(self.space)
        whole = np.array([(self.first, PAGES)], AREA)
        donation = self.space.donate(whole)
        assert (donation.status == PageStatus.DONE).all()
        merged = self.space.merge(donation.segment, np.array([(self.first, PAGES, 0)], EXTENT))
        assert (merged.status == PageStatus.DONE).all()
        assert donation.segment is not None
        donation.segment.close()
        assert self.tell("write") == 0
        look(self.space)

    def policies(self) -> set[str]:
        """Memory policies in the area."""
        lines = [line.split() for line in Path(f"/proc/{self.process.pid}/numa_maps").read_text().splitlines()]
        return {policy for at, policy, *_ in lines if 0 <= int(at, 16) // 4096 - self.first < PAGES}

    def restore(self) -> tuple[int, int]:
        result = self.space.restore(np.array([(self.first, PAGES)], AREA))
        return result.pages_restored, result.pages_left

    def end(self) -> None:
        self.space.close()
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def pinned(preload: Preload, tmp_path: Path) -> Iterator[Pinned]:
    made = Pinned(preload, tmp_path, tmp_path / "slow")
    yield made
    made.end()


def test_islands_are_memory_like_any_other_again(preload: Preload, tmp_path: Path) -> None:
    process = Process(preload, tmp_path, advice="MADV_NOHUGEPAGE")
    if process.space.swap != Swap.MOVE:
        pytest.skip("no UFFDIO_MOVE here")
    first, pages = process.address // 4096, 4 * HUGE
    whole = np.array([(first, pages)], AREA)
    donation = process.space.donate(whole)
    extents = np.array([(first + at, 1, at) for at in range(0, pages, 2)], EXTENT)  # a mapping each
    assert (process.space.merge(donation.segment, extents).status == PageStatus.DONE).all()
    for page in range(0, pages, 2):
        process.tell(page * 4096)
    look(process.space)
    assert process.space.restore(whole).pages_restored == pages // 2
    assert process.tell("check") == "0\n"
    assert "samepage (deleted)" not in Path(f"/proc/{process.process.pid}/maps").read_text()
    everything = np.array([(first, pages, 0)], EXTENT)
    look(process.space)
    assert (process.space.merge(donation.segment, everything).status == PageStatus.DONE).all()
    assert process.tell("check") == "0\n"
    process.end()


def test_registered_buffers_are_left_until_they_are_unregistered(pinned: Pinned) -> None:
    pinned.tell("write")
    pinned.make_islands()
    if pinned.tell("pin"):
        pytest.skip("no io_uring here")
    restored, left = pinned.restore()
    assert LENGTH <= left <= LENGTH + 16  # pages around it may be left, too
    assert restored == PAGES - left
    assert pinned.tell("check") == 0
    assert pinned.policies() == {"default"}
    for _ in range(3):
        pinned.tell("device")
        assert pinned.tell("check") == 0, "what the device wrote went to a page that nobody sees"
        assert pinned.restore() == (0, left)
    pinned.tell("unpin")
    assert pinned.restore() == (left, 0)
    assert pinned.tell("check") == 0
    assert pinned.tell("child") == 0
    # And over again, as the ordinary memory that it is.
    pinned.make_islands()
    assert pinned.restore() == (PAGES, 0)
    assert pinned.tell("check") == 0


def test_an_unmerge_leaves_them_too(pinned: Pinned) -> None:
    pinned.tell("write")
    pinned.make_islands()
    if pinned.tell("pin"):
        pytest.skip("no io_uring here")
    assert pinned.space.break_ksm(pinned.first, PAGES).errno == 0
    pinned.tell("device")
    assert pinned.tell("check") == 0
    pinned.tell("unpin")
    assert pinned.space.break_ksm(pinned.first, PAGES).errno == 0
    assert pinned.restore() == (0, 0)
    assert pinned.tell("check") == 0


def test_a_process_that_is_traced_is_left_as_it_is(pinned: Pinned) -> None:
    pinned.tell("write")
    pinned.make_islands()
    libc = ctypes.CDLL(None)
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    if libc.ptrace(PTRACE_SEIZE, pinned.process.pid, None, None):
        pytest.skip("may not trace here")
    time.sleep(0.05)
    assert pinned.restore() == (0, 0)
    os.kill(pinned.process.pid, signal.SIGSTOP)
    os.waitpid(pinned.process.pid, 0)
    assert libc.ptrace(PTRACE_DETACH, pinned.process.pid, None, None) == 0
    os.kill(pinned.process.pid, signal.SIGCONT)
    time.sleep(0.05)
    assert pinned.restore() == (PAGES, 0)
    assert pinned.tell("check") == 0


@contextmanager
def slow_file(directory: Path) -> Iterator[tuple[Path, Path, subprocess.Popen[str]]]:
    """A file that is read slowly; what has to be there for a read to end; who says that one began."""
    flags = subprocess.run(["pkg-config", "--cflags", "--libs", "fuse3"], capture_output=True, text=True)
    if flags.returncode or not os.access("/dev/fuse", os.W_OK):
        pytest.skip("no libfuse, or no /dev/fuse that may be written to")
    program = compile_c(HERE / "slow_file.c", directory / "slow_file", *flags.stdout.split())
    mount, go = directory / "mount", directory / "go"
    mount.mkdir()
    served = subprocess.Popen([str(program), str(mount), str(go)], stdout=subprocess.PIPE, text=True)
    try:
        for _ in range(100):
            if os.path.ismount(mount):
                break
            time.sleep(0.05)
        else:
            pytest.skip("may not mount here")
        yield mount / "slow", go, served
    finally:
        go.touch()
        subprocess.run(["umount", "--lazy", str(mount)], check=False)
        served.kill()
        served.wait()


def test_a_read_in_flight_keeps_the_pages_it_reads_into(preload: Preload, tmp_path: Path) -> None:
    with slow_file(tmp_path) as (slow, go, served):
        pinned = Pinned(preload, tmp_path, slow)
        try:
            pinned.tell("write")
            pinned.make_islands()
            pinned.tell("read")
            assert served.stdout is not None
            assert served.stdout.readline() == "reading\n"
            restored, left = pinned.restore()
            assert left >= LENGTH
            assert restored == PAGES - left
            assert pinned.restore() == (0, left)
            go.touch()
            pinned.tell("join")
            assert pinned.tell("check") == 0, "what was read went to a page that nobody sees"
            assert pinned.restore() == (left, 0)
            assert pinned.tell("check") == 0
        finally:
            go.touch()
            pinned.end()
