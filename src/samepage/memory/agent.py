"""The address space of a real process: the far end of a socket, where an agent answers (`agent/base/wire.h`).

`handshake` is how a process joins, and `conversation` how requests and answers travel; `answers` parses and checks the
answers. The requests are here.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
import weakref
from pathlib import Path

import numpy as np
import numpy.typing as npt

from samepage.memory import (
    AREA,
    PAGE_SIZE,
    U8,
    U64,
    VPN_END,
    ZERO_PAGE,
    Areas,
    BreakResult,
    Claims,
    Donation,
    MergeResult,
    PageStatus,
    RestoreResult,
    ScanFlag,
    ScanResult,
    Segment,
    Stirring,
    answers,
    check,
    handshake,
    proof,
    wire,
)
from samepage.memory.conversation import ENDED, TIMEOUT, Conversation
from samepage.memory.extents import MERGE_MAX, packets
from samepage.memory.handshake import Terms
from samepage.memory.pagemap import occupied
from samepage.memory.segments import OPEN, MemfdSegment
from samepage.memory.wire import Op, Packet, Swap
from samepage.process.halt import cgroups_of
from samepage.process.identity import TICKS, Identity, memory_of
from samepage.process.merge_domain import MergeDomain

BREAK_RATE = 64 << 20
"""The slowest rate, in bytes a second, at which a process copies: memory is reclaimed for it, so a long range has that
much more time."""

DONATE_MAX = 2048
"""The most pages in one donation: a segment of 8 MiB."""

HURRIED_MAX = 512
"""Pages in one MERGE packet at most for who has little time for an answer (`Conversation.hurry`): a huge page. So it
gets on even if it is slow, on a busy machine or an emulated one."""

RUNS_MAX = wire.BODY_MAX // AREA.itemsize
"""The most runs of pages in one packet."""

LIST_CHANGED = -1
"""The `seq` of a list of areas that changed while it was read."""


class AgentAddressSpace(Conversation):
    """One process behind a socket whose handshake is done (see `welcome`)."""

    def __init__(
        self,
        sock: socket.socket,
        pid: int,
        domain: MergeDomain,
        comm: str,
        ready: dict[str, int],
        identity: Identity | None = None,
    ) -> None:
        super().__init__(sock, pid, identity)
        self.domain = domain
        self.owner = identity.domain if identity is not None else domain
        self.comm = comm
        """The name that the process gives itself."""
        self.swap = Swap(ready["swap"])
        """How it swaps pages under its threads."""
        self.tracking = bool(ready["tracking"])
        """Whether it knows which pages were written since the last scan."""
        self.zero_checksum = ready["zero_checksum"]
        self._unnamed = bool(ready["unnamed"])
        self._has: weakref.WeakSet[MemfdSegment] = weakref.WeakSet()  # segments that it made, or was given
        self._proved = proof.Proved()

    @classmethod
    def welcome(
        cls,
        sock: socket.socket,
        hello: Packet,
        pid: int,
        domain: MergeDomain,
        terms: Terms,
        userfaultfd: int = -1,
        identity: Identity | None = None,
    ) -> AgentAddressSpace:
        """Answer `hello` and wait for READY. `userfaultfd` (of /dev/userfaultfd, or -1) stays the caller's. None for
        `identity`: it is this very process.

        Takes over `sock`, except when it raises `AddressSpaceGone`: for a peer of another version or page
        size, one that is not ready in `TIMEOUT` seconds, or one that does not speak this protocol.
        """
        sock.settimeout(TIMEOUT)
        comm = handshake.greet(sock, hello, pid, terms, userfaultfd)
        return cls.ready(sock, pid, domain, comm, identity)

    @classmethod
    def ready(
        cls, sock: socket.socket, pid: int, domain: MergeDomain, comm: str, identity: Identity | None
    ) -> AgentAddressSpace:
        """The second half of `welcome`: wait for READY of a process that was greeted."""
        return cls(sock, pid, domain, comm, handshake.ready(sock, pid), identity)

    def pages_max(self) -> int:
        if self._identity is None:
            return VPN_END
        try:
            kib = memory_of(self.pid)
        except OSError as e:
            raise self.lost(ENDED) from e
        self.verify()
        return kib * 1024 // PAGE_SIZE

    def stirring(self) -> Stirring | None:
        if not self._unnamed:
            return None
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            return None
        return Stirring(int(fields[7]), int(fields[21]), (int(fields[11]) + int(fields[12])) / TICKS)

    def areas(self) -> Areas:
        """As the protocol says. A process with many areas may change them all the time: when the list changed between
        two packets, its `seq` is none that a process says, and the list is asked for again after the next scan."""
        parts: list[npt.NDArray[np.void]] = []
        seqs: set[int] = set()
        vpn = count = npages = 0
        while True:
            with self.ask(Op.AREAS, np.uint64(vpn).tobytes()) as answer:
                head, part = answers.areas(answer, vpn)
                count, npages = count + len(part), npages + int(part["npages"].sum())
                check.areas(count, npages)
            seqs.add(head["seq"])
            parts.append(part)
            vpn = head["next_vpn"]
            if not vpn:
                seq = seqs.pop() if len(seqs) == 1 else LIST_CHANGED
                return Areas(seq, np.concatenate(parts), bool(head["merge_any"]))

    def scan(self, vpn: int, budget: int, flags: ScanFlag = ScanFlag.NONE, end: int = VPN_END) -> ScanResult:
        def understand(answer: Packet) -> ScanResult:
            return answers.scanned(answer, vpn, budget)

        body = wire.pack(wire.SCAN, vpn, budget, end, flags, 0)
        with self.ask(Op.SCAN, body, scan=understand) as answer:
            return understand(answer)

    def donate(self, runs: npt.NDArray[np.void]) -> Donation:
        """As the protocol says, for at most `DONATE_MAX` pages (ValueError)."""
        started = time.perf_counter_ns()
        npages = int(runs["npages"].sum())
        if npages > DONATE_MAX:
            raise ValueError(f"a donation of {npages} pages; {DONATE_MAX} at most")
        if OPEN.full():  # nobody is asked for a copy that could not be handed on
            return Donation(None, np.full(npages, PageStatus.NOMEM, np.uint8))
        body, patience = runs.astype(AREA, copy=False).tobytes(), npages * PAGE_SIZE / BREAK_RATE
        with self.ask(Op.DONATE, body, may_have_fd=True, patience=patience) as answer:
            donation = answers.donated(answer, npages, started)
        if isinstance(donation.segment, MemfdSegment):
            self._has.add(donation.segment)
        return donation

    def prove_ahead(self, claims: Claims) -> None:
        """As the protocol says."""
        new = [vpns for segment, vpns in claims if segment not in self._has]
        self._proved = proof.ahead(new, self._prove) if len(new) > 1 else proof.Proved()

    def merge(self, segment: Segment | None, extents: npt.NDArray[np.void]) -> MergeResult:
        """As the protocol says. A segment must be a `MemfdSegment`, and is not passed before the process proved
        that it has a page of it. Many extents go in several packets, and when the process goes between two of them,
        what the earlier ones did is not told. Who has little time for an answer is sent no more of them after that
        time: the rest is BUSY."""
        fd = -1
        started, cpu_ns = time.perf_counter_ns(), 0
        if segment is not None:
            if not isinstance(segment, MemfdSegment):
                raise TypeError(f"{segment!r} cannot be passed to a process")
            fd = segment.fileno()
            named = extents["offset"] != ZERO_PAGE
            if segment not in self._has and named.any():
                refuted = proof.refuted(fd, extents[named], self._prove, self._proved)
                if refuted is not None:
                    return self._merge_zeros(extents, named, refuted)
                self._has.add(segment)
            fd = fd if named.any() else -1
        statuses: list[U8] = []
        for part in packets(extents, MERGE_MAX if self.hurry == math.inf else HURRIED_MAX):
            npages = int(part["npages"].sum())
            if time.perf_counter_ns() - started > self.hurry * 1e9:
                statuses.append(np.full(npages, PageStatus.BUSY, np.uint8))
                continue
            with self.ask(Op.MERGE, part.tobytes(), fd=fd) as answer:
                ns, status = answers.statuses(answer, npages)
            statuses.append(status)
            cpu_ns += ns
        status = np.concatenate(statuses) if statuses else np.empty(0, np.uint8)
        return MergeResult(status, answers.credible(cpu_ns, started))

    def _merge_zeros(self, extents: npt.NDArray[np.void], named: npt.NDArray[np.bool_], refuted: U8) -> MergeResult:
        """What is left of a request to merge, all but what is `named` of a segment: that was `refuted`."""
        result = self.merge(None, extents[~named]) if not named.all() else MergeResult(np.empty(0, np.uint8))
        status = np.empty(int(extents["npages"].sum()), np.uint8)
        pages = np.repeat(named, extents["npages"].astype(np.int64))
        status[pages], status[~pages] = refuted, result.status
        return MergeResult(status, result.cpu_ns)

    def _prove(self, key: bytes, vpns: U64) -> tuple[U8, list[bytes]]:
        """See `proof.Ask`."""
        with self.ask(Op.PROVE, key + vpns.tobytes()) as answer:
            return answers.proved(answer, len(vpns))

    def break_ksm(self, vpn: int, npages: int) -> BreakResult:
        patience = npages * PAGE_SIZE / BREAK_RATE
        if patience > 1.0:  # areas may be of any size, but what is copied it has
            patience = min(patience, 1.0 + self.pages_max() * PAGE_SIZE / BREAK_RATE)
        with self.ask(Op.BREAK, wire.pack(AREA, vpn, npages), patience=patience) as answer:
            return answers.broken(answer, npages)

    def restore(self, runs: npt.NDArray[np.void]) -> RestoreResult:
        """As the protocol says, for at most `RUNS_MAX` runs (ValueError)."""
        if len(runs) > RUNS_MAX:
            raise ValueError(f"{len(runs)} runs to restore; {RUNS_MAX} at most")
        npages = int(runs["npages"].sum())
        body = runs.astype(AREA, copy=False).tobytes()
        with self.ask(Op.RESTORE, body, patience=npages * PAGE_SIZE / BREAK_RATE) as answer:
            return answers.restored(answer, npages)

    def present(self, vpn: int, npages: int) -> npt.NDArray[np.void]:
        found: list[tuple[int, int]] = []
        with contextlib.suppress(OSError), open(f"/proc/{self.pid}/pagemap", "rb", buffering=0) as file:
            # What was opened stays that of one program. Only now is it known of which: not one that was executed since.
            self.verify()
            past = min(vpn + npages, VPN_END - 1)  # whatever areas a process says it has
            for start, end in occupied(file.fileno(), vpn * PAGE_SIZE, past * PAGE_SIZE):
                found.append((start // PAGE_SIZE, (end - start) // PAGE_SIZE))
        return np.array(found, AREA)

    def map_count(self) -> tuple[int, int]:
        with self.ask(Op.MAP_COUNT) as answer:
            found = answers.one(answer, wire.MAP_COUNT)
        return found["used"], found["limit"]

    def headroom(self) -> tuple[str, int]:
        with self.ask(Op.HEADROOM) as answer:
            found = answers.one(answer, wire.HEADROOM)
        group = memory_cgroup(self.pid)
        self.verify()
        return group, found["available"]

    def __repr__(self) -> str:
        return f"<AgentAddressSpace pid={self.pid} comm={self.comm!r} swap={self.swap.name.lower()}>"


def memory_cgroup(pid: int) -> str:
    """Path of the process's memory cgroup, from /proc/PID/cgroup: of v1's memory controller where that is mounted, else
    of the one hierarchy of v2. "" when the process is gone."""
    found = ""
    with contextlib.suppress(OSError):
        for _, controllers, path in cgroups_of(pid):
            if "memory" in controllers.split(","):
                return _printable(path)
            if not controllers:
                found = path
    return _printable(found)


def _printable(path: str) -> str:
    """Make a name printable for JSON, which has no bytes that are not text."""
    return os.fsencode(path).decode(errors="backslashreplace")
