"""A process under the agent whose service is the test: asked one thing at a time, over the wire."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from samepage.agent import forbid_huge_pages
from samepage.memory import RunKind, ScanFlag, ScanResult, wire
from samepage.memory.agent import AgentAddressSpace
from samepage.memory.handshake import Terms
from samepage.memory.wire import Flags
from samepage.process.merge_domain import MergeDomain
from tests.agent.preload import Preload

HUGE = 512
PROGRAM = """
import ctypes, mmap, sys
n = 4 << 21
area = mmap.mmap(-1, n + (2 << 20), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
address = ctypes.addressof(ctypes.c_char.from_buffer(area))
start = -address % (2 << 20)
area.madvise(getattr(mmap, sys.argv[1]), start, n)
for page in range(0, n, 4096):
    area[start + page : start + page + 8] = page.to_bytes(8, "little")
area.madvise(mmap.MADV_MERGEABLE, start, n)
print(address + start, flush=True)
for line in sys.stdin:
    if line == "check\\n":
        wrong = [p for p in range(0, n, 4096) if area[start + p : start + p + 9] != p.to_bytes(8, "little") + b"\\0"]
        print(len(wrong), flush=True)
    else:
        area[start + int(line)] ^= 0
        print("written", flush=True)
"""

FILTER = """
import ctypes, os, struct, sys
advice, error = map(int, sys.argv[1:3])
words = [
    (0x20, 0, 0, 0), (0x15, 0, 3, 28),  # madvise?
    (0x20, 0, 0, 32), (0x15, 0, 1, advice),
    (0x06, 0, 0, 0x50000 | error), (0x06, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ERRNO, SECCOMP_RET_ALLOW
]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *word) for word in words))
text = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(words), ctypes.addressof(code)))
libc = ctypes.CDLL(None)
assert not libc.prctl(38, 1, 0, 0, 0) and not libc.prctl(22, 2, text, 0, 0)
os.execv(sys.argv[3], sys.argv[3:])
"""
MADV_DONTFORK = 10


def under_filter(advice: int, error: int, command: list[str]) -> list[str]:
    """The command under a seccomp filter by which the kernel does not make madvise(2) with this advice, and answers
    the error, or 0: as if it had. $SAMEPAGE_SECCOMP must say that one filter was tried."""
    return [sys.executable, "-c", FILTER, str(advice), str(error), *command]


class Process:
    """A program that says where its area is, and its address space as a service sees it. `PROGRAM` has 8 MiB, in huge
    pages or, by "MADV_NOHUGEPAGE", in small ones. By write-protection it may have no huge ones, unless they are
    `huge`."""

    def __init__(
        self,
        preload: Preload,
        folder: Path,
        program: str = PROGRAM,
        advice: str = "MADV_HUGEPAGE",
        command: list[str] | None = None,
        flags: int = 0,
        reserve: int = 0,
        huge: bool = False,
        **environment: str,
    ) -> None:
        path = str(folder / "socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(path)
            listener.listen()
            self.process = subprocess.Popen(
                command or [sys.executable, "-c", program, advice],
                env=os.environ
                | environment
                | {
                    "LD_PRELOAD": str(preload.library),
                    "SAMEPAGE_SOCKET": path,
                    "SAMEPAGE_MIN_ALLOC": str(1 << 40),
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE if command else None,
                text=True,
                preexec_fn=forbid_huge_pages if flags & Flags.SWAP_WP and not huge else None,
            )
            self.address = int(self.line())
            listener.settimeout(60)
            sock, _ = listener.accept()
        sock.settimeout(60)
        hello = wire.recv(sock)
        domain = MergeDomain(os.getuid())
        self.space = AgentAddressSpace.welcome(sock, hello, self.process.pid, domain, Terms(reserve, flags=flags))

    def insist(self) -> None:
        """From now on wait for an answer also while the process is stopped, as ksmd would not."""
        self.space._halt = lambda: None  # type: ignore[method-assign]

    def end(self) -> None:
        self.space.close()
        self.process.kill()
        self.process.communicate()

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def tell(self, what: object) -> str:
        print(what, file=self.process.stdin, flush=True)
        return self.line()

    def huge(self) -> int:
        """Huge pages in the area."""
        found = 0
        smaps = Path(f"/proc/{self.process.pid}/smaps").read_text()
        for start, kib in re.findall(r"^([0-9a-f]+)-.*?^AnonHugePages:\s+(\d+)", smaps, re.MULTILINE | re.DOTALL):
            if self.address <= int(start, 16) < self.address + (4 << 21):
                found += int(kib) // 2048
        return found

    def scan(self, budget: int) -> int:
        """Look at everything, so many pages at a time; returns how many were hashed."""
        hashed = 0
        for found in self.look(budget):
            hashed += len(found.checksums)
            assert all(run["kind"] == RunKind.HASHED for run in found.runs)
        return hashed

    def look(self, budget: int = 1 << 20, flags: ScanFlag = ScanFlag.NONE) -> Iterator[ScanResult]:
        """One look at everything, so many pages at a time: each answer."""
        found = self.space.scan(0, budget, flags)
        yield found
        while found.next_vpn:
            found = self.space.scan(found.next_vpn, budget, flags)
            yield found
