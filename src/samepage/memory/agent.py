"""The address space of a real process: the far end of a socket, where an agent answers (`agent/base/wire.h`).

The agent runs inside a process that may be anyone's. So nothing it says is taken on trust: an answer that is
late, short, out of order or cannot be true ends the connection, and what ksmd sees is `AddressSpaceGone`.
An honest agent that was cut off by mistake joins again by itself.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import select
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from samepage.memory import (
    AREA,
    DONE,
    EXTENT,
    PAGE_SIZE,
    RUN,
    U8,
    U64,
    USER_END,
    VPN_END,
    ZERO_PAGE,
    AddressSpaceGone,
    AddressSpaceSilent,
    Areas,
    BreakResult,
    Donation,
    MergeResult,
    PageStatus,
    RestoreResult,
    ScanFlag,
    ScanResult,
    Segment,
    check,
    proof,
    wire,
)
from samepage.memory.halt import SILENT, TRACED, Halt, agent_thread, cgroups, halt_of
from samepage.memory.identity import Identity, has_ended, identify, memory_of
from samepage.memory.pagemap import occupied
from samepage.memory.segments import OPEN, MemfdSegment, SegmentError
from samepage.memory.wire import Op, Packet, Swap, WireError

TIMEOUT = 10.0
"""Seconds an agent has for one answer."""

T = TypeVar("T")

LOOK_EVERY = 0.05
"""Seconds between two questions whether to go on waiting for an answer."""

CANCEL_PATIENCE = 1.0
"""Seconds that a process which is not stopped has to answer after a cancellation."""

TRACER_PATIENCE = 0.01
"""Seconds between two looks that tell a process which a tracer holds from one that it lets go on at once."""

BREAK_RATE = 64 << 20
"""Bytes a second, at worst, that `break_ksm` copies: a long range has that much more time, for memory is reclaimed."""

DONATE_MAX = 2048
"""Pages in one donation at most: a segment of 8 MiB."""

MERGE_MAX = 64 << 10
"""Pages in one MERGE packet at most, so that a status byte a page fits into the answer."""

RUNS_MAX = wire.BODY_MAX // AREA.itemsize
"""Runs of pages in one packet at most."""

EXTENTS_MAX = wire.BODY_MAX // EXTENT.itemsize

NOTHING_LOST = (Op.AREAS, Op.SCAN, Op.RESTORE, Op.MAP_COUNT, Op.HEADROOM, Op.PROVE)
"""What a process may have been asked when it fell silent: the answer is taken in, or asked for again. After any other
request ksmd could not tell what the process did."""

LIST_CHANGED = -1
"""The `seq` of a list of areas that changed while it was read."""

ENDED = "it ended"
"""What became of a process that closed its connection."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What the service tells an agent in WELCOME. `reserve` in bytes, `section` in pages."""

    reserve: int = 16 << 20
    section: int = 64
    use_swap: bool = False
    flags: int = 0
    """Of `wire.Flags`."""


@dataclass(slots=True, eq=False)
class _Request:
    """One that was sent. `ends`: until when its answer is waited for, as soon as it is its turn, `patience` seconds
    longer than usual; `scan`: how to understand it, if it is a scan."""

    op: Op
    seq: int
    patience: float = 0.0
    scan: Callable[[Packet], ScanResult] | None = None
    ends: float = math.inf


class AgentAddressSpace:
    """One process behind a SOCK_SEQPACKET socket whose handshake is done (see `welcome`).

    Several threads may ask, and no request waits for the answer to the one before: the process has it at hand when
    it is done with that. Answers come in the order of requests. After the first `AddressSpaceGone` every call
    raises it. `close` is for whoever made the connection: until then the descriptor stays valid, so that a
    poll on it sees the hangup and no other connection can be given its number.
    """

    def __init__(
        self,
        sock: socket.socket,
        pid: int,
        domain: int,
        comm: str,
        ready: dict[str, int],
        identity: Identity | None = None,
    ) -> None:
        self._sock = sock
        self._asking = threading.Condition()  # held to send, so that requests are sent in the order of their numbers
        self._seq = 0
        self._unanswered: deque[_Request] = deque()
        self._owed: deque[_Request] = deque()  # nobody waits for these answers any more: the process is silent
        self._silence = ""
        self._thread = 0
        self._gone: str | None = None
        self._pid = pid
        self._domain = domain
        self.comm = comm
        """Name of the process, as it says itself."""
        self.swap = Swap(ready["swap"])
        """How it swaps pages under its threads."""
        self.tracking = bool(ready["tracking"])
        """Whether it knows which pages were written since the last scan."""
        self._zero_checksum = ready["zero_checksum"]
        self._identity = identity
        self.doubtful = False
        """It sent a descriptor of something that no agent sends."""
        self._has: weakref.WeakSet[MemfdSegment] = weakref.WeakSet()  # segments that it made, or was given
        self._cancelled: Callable[[], bool] | None = None
        self.hurry = math.inf
        """After so many seconds without an answer it is silent, and nobody waits for it, whether it can run or not."""
        sock.settimeout(LOOK_EVERY)

    @classmethod
    def welcome(
        cls,
        sock: socket.socket,
        hello: Packet,
        pid: int,
        domain: int,
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
        comm = greet(sock, hello, pid, terms, userfaultfd)
        return cls.ready(sock, pid, domain, comm, identity)

    @classmethod
    def ready(
        cls, sock: socket.socket, pid: int, domain: int, comm: str, identity: Identity | None
    ) -> AgentAddressSpace:
        """The second half of `welcome`: wait for READY of a process that was greeted."""
        try:
            return cls(sock, pid, domain, comm, _check_ready(wire.recv_plain(sock)), identity)
        except (WireError, OSError) as e:
            raise AddressSpaceGone(f"process {pid} did not join: {_why(e)}") from e

    @property
    def pid(self) -> int:
        return self._pid

    @property
    def domain(self) -> int:
        return self._domain

    @property
    def zero_checksum(self) -> int:
        return self._zero_checksum

    def fileno(self) -> int:
        """The socket, to poll for the hangup."""
        return self._sock.fileno()

    def hang_up(self, why: str = "the service let go of it") -> None:
        """End the conversation, from any thread: whoever waits for an answer, or asks next, gets `AddressSpaceGone`."""
        if self._gone is None:
            self._gone = why
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    @property
    def gone(self) -> str | None:
        """Why nothing can be asked of it any more; `ENDED` if it went by itself."""
        return self._gone

    def close(self, closing: Callable[[socket.socket], None] = socket.socket.close) -> None:
        """Hang up and give the descriptor back, by `closing` it."""
        self.hang_up()
        with self._asking:
            self._asking.wait_for(lambda: not self._unanswered)
            closing(self._sock)

    def is_there(self) -> bool:
        try:
            return self._identity is None or (self._identity.is_of(identify(self._pid)) and not has_ended(self._pid))
        except OSError:
            return False

    def halted(self) -> str:
        halt = self._halt()
        if halt is not None and halt.why == TRACED:
            time.sleep(TRACER_PATIENCE)
            halt = halt if halt == self._halt() else None
        return halt.why if halt else ""

    def _halt(self) -> Halt | None:
        """What keeps its agent from running; nothing that is so of another process that has the number by now, or of
        another program."""
        self._thread = self._thread or agent_thread(self._pid)
        halt = halt_of(self._pid, self._thread)
        return halt if halt is None or self.is_there() else None

    def catch_up(self) -> tuple[str, list[ScanResult]]:
        found: list[ScanResult] = []
        ready = select.poll()
        ready.register(self._sock, select.POLLIN)
        while self._owed:
            owed = self._owed[0]
            if not ready.poll(0):
                self._silence = self.halted() or SILENT
                if self._silence != SILENT:
                    owed.ends = time.monotonic() + TIMEOUT
                elif time.monotonic() >= owed.ends:
                    raise self._lost("no answer in time")
                return self._silence, found
            with self._answer(owed, wire.recv_plain if owed.op != Op.DONATE else wire.recv_memfd) as answer:
                if owed.op not in NOTHING_LOST:
                    raise WireError(f"it was {self._silence} in the middle of a request, and joins again")
                if owed.scan is not None:
                    found.append(owed.scan(answer))
            self._owed.popleft()
        return self.halted(), found

    @contextlib.contextmanager
    def interruptible(self, cancelled: Callable[[], bool]) -> Iterator[None]:
        self._cancelled = cancelled
        try:
            yield
        finally:
            self._cancelled = None

    def verify(self) -> None:
        if self._gone is not None:
            raise self._lost(self._gone)
        if self._identity is not None:
            try:
                changed = self._identity.differs(identify(self._pid))
                # The kernel tells nobody the namespace of a process that just ended.
                changed = ENDED if changed and has_ended(self._pid) else changed
            except OSError:
                changed = ENDED
            if changed:
                raise self._lost(changed)

    def pages_max(self) -> int:
        if self._identity is None:
            return VPN_END
        try:
            kib = memory_of(self._pid)
        except OSError as e:
            raise self._lost(ENDED) from e
        self.verify()
        return kib * 1024 // PAGE_SIZE

    def areas(self) -> Areas:
        """As the protocol says. A process with many areas may change them all the time: when the list changed between
        two packets, its `seq` is none that a process says, and the list is asked for again after the next scan."""
        parts: list[npt.NDArray[np.void]] = []
        seqs: set[int] = set()
        vpn = count = npages = 0
        while True:
            with self._ask(Op.AREAS, np.uint64(vpn).tobytes()) as answer:
                reader = answer.reader()
                head = reader.one(wire.AREAS)
                part = reader.rest(AREA)
                seqs.add(head["seq"])
                check.disjoint(part, "areas")
                count, npages = count + len(part), npages + int(part["npages"].sum())
                check.areas(count, npages)
                last = int(part["vpn"][-1] + part["npages"][-1]) if len(part) else 0
                if parts and len(part) and int(part["vpn"][0]) < vpn:
                    raise WireError("areas out of order")
                if head["next_vpn"] and not (len(part) and last <= head["next_vpn"] < USER_END):
                    raise WireError("a list of areas without an end")
            parts.append(part)
            vpn = head["next_vpn"]
            if not vpn:
                seq = seqs.pop() if len(seqs) == 1 else LIST_CHANGED
                return Areas(seq, np.concatenate(parts), bool(head["merge_any"]))

    def scan(self, vpn: int, budget: int, flags: ScanFlag = ScanFlag.NONE, end: int = VPN_END) -> ScanResult:
        def understand(answer: Packet) -> ScanResult:
            reader = answer.reader()
            head = reader.one(wire.SCANNED)
            if head["nhashed"] > budget:
                raise WireError(f"{head['nhashed']} checksums; {budget} were asked for")
            runs = reader.take(RUN, head["nruns"])
            checksums: U64 = reader.take("<u8", head["nhashed"])
            reader.end()
            forked = head["forked_ms"] / 1000
            found = ScanResult(runs, checksums, head["next_vpn"], head["areas_seq"], head["cpu_ns"], forked)
            check.scanned(found, vpn)
            return found

        body = wire.pack(wire.SCAN, vpn, budget, end, flags, 0)
        with self._ask(Op.SCAN, body, scan=understand) as answer:
            return understand(answer)

    def donate(self, runs: npt.NDArray[np.void]) -> Donation:
        """As the protocol says, for at most `DONATE_MAX` pages (ValueError)."""
        started = time.perf_counter_ns()
        npages = int(runs["npages"].sum())
        if npages > DONATE_MAX:
            raise ValueError(f"a donation of {npages} pages; {DONATE_MAX} at most")
        if OPEN.full():  # nobody is asked for a copy that could not be handed on
            return Donation(None, np.full(npages, PageStatus.NOMEM, np.uint8))
        with self._ask(Op.DONATE, runs.astype(AREA, copy=False).tobytes(), may_have_fd=True) as answer:
            cpu_ns, status = _statuses(answer, npages)
            if answer.fd == wire.LOST:
                OPEN.lost += 1
                status = np.where(status == DONE, np.uint8(PageStatus.NOMEM), status)
            done = int(np.count_nonzero(status == DONE))
            if (done > 0) != (answer.fd >= 0):
                raise WireError(f"{done} pages donated, {'a' if answer.fd >= 0 else 'no'} segment")
            segment = MemfdSegment(answer.take_fd(), done) if done else None
            if segment is not None:
                self._has.add(segment)
            donation = Donation(segment, status, _credible(cpu_ns, started))
            try:
                check.donated(donation, npages)
            except AddressSpaceGone:
                donation.close()
                raise
        return donation

    def merge(self, segment: Segment | None, extents: npt.NDArray[np.void]) -> MergeResult:
        """As the protocol says. A segment must be a `MemfdSegment`, and is not passed
        before the process proved that it has a page of it. Many extents go in several packets, and when the process
        goes between two of them, what the earlier ones did is not told."""
        fd = -1
        started, cpu_ns = time.perf_counter_ns(), 0
        if segment is not None:
            if not isinstance(segment, MemfdSegment):
                raise TypeError(f"{segment!r} cannot be passed to a process")
            fd = segment.fileno()
            named = extents["offset"] != ZERO_PAGE
            if segment not in self._has and named.any():
                refuted = proof.refuted(fd, extents[named], self._prove)
                if refuted is not None:
                    return self._merge_zeros(extents, named, refuted)
                self._has.add(segment)
            fd = fd if named.any() else -1
        statuses: list[U8] = []
        for part in _packets(extents):
            with self._ask(Op.MERGE, part.tobytes(), fd=fd) as answer:
                npages = int(part["npages"].sum())
                ns, status = _statuses(answer, npages)
                check.statuses(status, npages)
            statuses.append(status)
            cpu_ns += ns
        status = np.concatenate(statuses) if statuses else np.empty(0, np.uint8)
        return MergeResult(status, _credible(cpu_ns, started))

    def _merge_zeros(self, extents: npt.NDArray[np.void], named: npt.NDArray[np.bool_], refuted: U8) -> MergeResult:
        """What is left of a request to merge, all but what is `named` of a segment: that was `refuted`."""
        result = self.merge(None, extents[~named]) if not named.all() else MergeResult(np.empty(0, np.uint8))
        status = np.empty(int(extents["npages"].sum()), np.uint8)
        pages = np.repeat(named, extents["npages"].astype(np.int64))
        status[pages], status[~pages] = refuted, result.status
        return MergeResult(status, result.cpu_ns)

    def _prove(self, key: bytes, vpns: U64) -> tuple[U8, list[bytes]]:
        """See `proof.Ask`."""
        with self._ask(Op.PROVE, key + vpns.tobytes()) as answer:
            reader = answer.reader()
            done = reader.one(wire.DONE)
            status: U8 = reader.take(np.uint8, len(vpns))
            proofs = reader.take(np.uint8, len(vpns) * wire.PROOF_SIZE).tobytes()
            reader.end()
            if done["npages"] != len(vpns):
                raise WireError("a proof of other pages")
            check.statuses(status, len(vpns))
        return status, [proofs[at : at + wire.PROOF_SIZE] for at in range(0, len(proofs), wire.PROOF_SIZE)]

    def break_ksm(self, vpn: int, npages: int) -> BreakResult:
        patience = npages * PAGE_SIZE / BREAK_RATE
        if patience > 1.0:  # areas may be of any size, but what is copied it has
            patience = min(patience, 1.0 + self.pages_max() * PAGE_SIZE / BREAK_RATE)
        with self._ask(Op.BREAK, wire.pack(AREA, vpn, npages), patience=patience) as answer:
            reader = answer.reader()
            broken = reader.one(wire.BROKEN)
            reader.end()
            result = BreakResult(
                broken["error"],
                broken["pages_unmerged"],
                broken["pages_remaining"],
                broken["bytes_needed"],
                broken["bytes_available"],
                bool(broken["unseen"]),
            )
            check.broken(result, npages)
        return result

    def restore(self, runs: npt.NDArray[np.void]) -> RestoreResult:
        """As the protocol says, for at most `RUNS_MAX` runs (ValueError)."""
        if len(runs) > RUNS_MAX:
            raise ValueError(f"{len(runs)} runs to restore; {RUNS_MAX} at most")
        npages = int(runs["npages"].sum())
        body = runs.astype(AREA, copy=False).tobytes()
        with self._ask(Op.RESTORE, body, patience=npages * PAGE_SIZE / BREAK_RATE) as answer:
            reader = answer.reader()
            found = reader.one(wire.RESTORED)
            reader.end()
            result = RestoreResult(found["pages_restored"], found["pages_left"], found["cpu_ns"])
            check.restored(result, npages)
        return result

    def present(self, vpn: int, npages: int) -> npt.NDArray[np.void]:
        found: list[tuple[int, int]] = []
        with contextlib.suppress(OSError), open(f"/proc/{self._pid}/pagemap", "rb", buffering=0) as file:
            # What was opened stays that of one program. Only now is it known of which: not one that was executed since.
            self.verify()
            past = min(vpn + npages, VPN_END - 1)  # whatever areas a process says it has
            for start, end in occupied(file.fileno(), vpn * PAGE_SIZE, past * PAGE_SIZE):
                found.append((start // PAGE_SIZE, (end - start) // PAGE_SIZE))
        return np.array(found, AREA)

    def map_count(self) -> tuple[int, int]:
        with self._ask(Op.MAP_COUNT) as answer:
            reader = answer.reader()
            found = reader.one(wire.MAP_COUNT)
            reader.end()
        return found["used"], found["limit"]

    def headroom(self) -> tuple[str, int]:
        with self._ask(Op.HEADROOM) as answer:
            reader = answer.reader()
            found = reader.one(wire.HEADROOM)
            reader.end()
        group = memory_cgroup(self._pid)
        self.verify()
        return group, found["available"]

    @contextlib.contextmanager
    def _ask(
        self,
        op: Op,
        body: bytes = b"",
        fd: int = -1,
        may_have_fd: bool = False,
        patience: float = 0.0,
        scan: Callable[[Packet], ScanResult] | None = None,
    ) -> Iterator[Packet]:
        """Send a request and give its answer to the block, which checks it: see `_answer`."""
        with self._lost_by_errors():
            request = self._send(op, body, fd, patience, scan)
        receive = wire.recv_memfd if may_have_fd else wire.recv_plain
        with self._answer(request, lambda _: self._recv(request, receive)) as answer:
            yield answer

    @contextlib.contextmanager
    def _answer(self, request: _Request, recv: Callable[[socket.socket], Packet]) -> Iterator[Packet]:
        """What `recv` receives, which must be the answer to `request`. Any `WireError`, also the block's, any socket
        error and any silence end the connection. A descriptor the block leaves is closed."""
        with self._lost_by_errors():
            answer = recv(self._sock)
            try:
                if (answer.op, answer.seq) != (request.op, request.seq):
                    raise WireError(f"asked {request.op.name} #{request.seq}, answered op {answer.op} #{answer.seq}")
                if answer.error:
                    raise WireError(f"{request.op.name} failed with {errno.errorcode.get(answer.error, answer.error)}")
                yield answer
            finally:
                answer.close()

    @contextlib.contextmanager
    def _lost_by_errors(self) -> Iterator[None]:
        try:
            yield
        except AddressSpaceSilent:
            raise
        except (WireError, SegmentError, OSError) as e:
            self.doubtful |= isinstance(e, wire.Doubtful)
            raise self._lost(_why(e)) from e
        except BaseException:
            # A KeyboardInterrupt, say: an answer may be left on the way, and would be taken for the next one's.
            self.hang_up("interrupted in the middle of a request")
            raise

    def _send(
        self, op: Op, body: bytes, fd: int, patience: float, scan: Callable[[Packet], ScanResult] | None
    ) -> _Request:
        """Returns the request, whose answer must be taken in."""
        with self._asking:
            if self._gone is not None:
                raise self._lost(self._gone)
            if self._owed:
                raise AddressSpaceSilent(self._pid, self._silence)
            self._seq = (self._seq + 1) & 0xFFFFFFFF
            request = _Request(op, self._seq, patience, scan)
            self._insist(lambda: wire.send(self._sock, op, request.seq, body, fd=fd), time.monotonic() + TIMEOUT)
            self._unanswered.append(request)
            return request

    def _recv(self, request: _Request, recv: Callable[[socket.socket], Packet]) -> Packet:
        try:
            with self._asking:
                every = None if self._cancelled is None else LOOK_EVERY
                while not self._asking.wait_for(lambda: self._unanswered[0] is request, every):
                    if self._cancelled is not None and self._cancelled():
                        raise TimeoutError
                if self._owed:  # what was asked before this
                    raise AddressSpaceSilent(self._pid, self._silence)
            request.ends = time.monotonic() + TIMEOUT + request.patience
            return self._insist(lambda: recv(self._sock), request.ends, request.patience)
        except AddressSpaceSilent as e:
            with self._asking:
                self._owed.append(request)
                self._silence = e.state
            raise
        finally:
            with self._asking:
                self._unanswered.remove(request)
                self._asking.notify_all()

    def _insist(self, do: Callable[[], T], ends: float, patience: float = 0.0) -> T:
        """Do something with the socket. TimeoutError at `ends`, or a while after a cancellation: not at once, for
        without the answer all has to be asked anew. AddressSpaceSilent as soon as it is seen that the process does not
        run."""
        called_off = False
        hurries = time.monotonic() + self.hurry + patience
        before: Halt | None = None
        while True:
            try:
                return do()
            except TimeoutError:
                now = time.monotonic()
                if not called_off and self._cancelled is not None and self._cancelled():
                    called_off, ends = True, min(ends, now + CANCEL_PATIENCE)
                if now >= ends:
                    raise
            halt = self._halt()
            if (halt is not None and halt == before) or now >= hurries:
                raise AddressSpaceSilent(self._pid, halt.why if halt else SILENT)
            before = halt

    def _lost(self, why: str) -> AddressSpaceGone:
        self.hang_up(why)
        return AddressSpaceGone(f"process {self._pid}: {self._gone}", ended=self._gone == ENDED)

    def __repr__(self) -> str:
        return f"<AgentAddressSpace pid={self._pid} comm={self.comm!r} swap={self.swap.name.lower()}>"


def greet(sock: socket.socket, hello: Packet, pid: int, terms: Terms, userfaultfd: int) -> str:
    """The first half of `AgentAddressSpace.welcome`: answer `hello`. Returns the name the process gives itself."""
    try:
        comm = _check_hello(hello)
        body = wire.pack(wire.WELCOME, wire.VERSION, terms.flags, terms.reserve, terms.section, terms.use_swap)
        wire.send(sock, Op.WELCOME, hello.seq, body, fd=userfaultfd)
    except (WireError, OSError) as e:
        raise AddressSpaceGone(f"process {pid} did not join: {_why(e)}") from e
    return comm


def memory_cgroup(pid: int) -> str:
    """Path of the process's memory cgroup, from /proc/PID/cgroup: of v1's memory controller where that is mounted, else
    of the one hierarchy of v2. "" when the process is gone."""
    found = ""
    with contextlib.suppress(OSError):
        for _, controllers, path in cgroups(f"/proc/{pid}/cgroup"):
            if "memory" in controllers.split(","):
                return _printable(path)
            if not controllers:
                found = path
    return _printable(found)


def _printable(path: str) -> str:
    """For JSON, which has no bytes that are not text."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _why(e: Exception) -> str:
    if isinstance(e, ConnectionError):
        return ENDED
    if isinstance(e, TimeoutError):
        return "no answer in time"
    return e.strerror if isinstance(e, OSError) and e.strerror else str(e)


def _check_hello(hello: Packet) -> str:
    """The name the process gives itself, made printable."""
    if hello.op != Op.HELLO or hello.fd >= 0:
        raise WireError(f"op {hello.op} instead of HELLO")
    reader = hello.reader()
    said = reader.one(wire.HELLO)
    reader.end()
    if said["magic"] != wire.MAGIC:
        raise WireError("not an agent")
    if said["version"] != wire.VERSION:
        raise WireError(f"its agent speaks version {said['version']}, this service version {wire.VERSION}")
    if said["page_size"] != PAGE_SIZE:
        raise WireError(f"pages of {said['page_size']} bytes")
    name = said["comm"].rstrip(b"\0").decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "?" for c in name)


def _check_ready(packet: Packet) -> dict[str, int]:
    with contextlib.closing(packet):
        if packet.op != Op.READY or packet.fd >= 0:
            raise WireError(f"op {packet.op} instead of READY")
        if packet.error:
            raise WireError(f"its agent cannot start: {os.strerror(packet.error)}")
        reader = packet.reader()
        ready = reader.one(wire.READY)
        reader.end()
    if ready["swap"] not in Swap.__members__.values():
        raise WireError(f"an unknown way to swap pages: {ready['swap']}")
    return ready


def _statuses(answer: Packet, npages: int) -> tuple[int, U8]:
    """CPU time in ns and the `PageStatus` of each of `npages` pages."""
    reader = answer.reader()
    done = reader.one(wire.DONE)
    status: U8 = reader.take(np.uint8, npages)
    reader.end()
    if done["npages"] != npages:
        raise WireError("an answer about other pages")
    return done["cpu_ns"], status


def _credible(cpu_ns: int, started: int) -> int:
    """Of the CPU time a process says it took, what can be true of its one thread."""
    return min(cpu_ns, time.perf_counter_ns() - started)


def _packets(extents: npt.NDArray[np.void]) -> Iterator[npt.NDArray[np.void]]:
    """Split `extents`, in order, so that each part fits into a packet and so does the answer to it."""
    extents = _shorten(extents.astype(EXTENT, copy=False))
    ends = np.cumsum(extents["npages"])
    start = 0
    while start < len(extents):
        before = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, before + MERGE_MAX, side="right"))
        stop = min(stop, start + EXTENTS_MAX)
        yield extents[start:stop]
        start = stop


def _shorten(extents: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """The same pages with no extent longer than `MERGE_MAX`."""
    parts = -(-extents["npages"].astype(np.int64) // MERGE_MAX)
    if not np.any(parts > 1):
        return extents
    out = np.repeat(extents, parts)
    nth = np.arange(len(out)) - np.repeat(np.cumsum(parts) - parts, parts)
    skip = (nth * MERGE_MAX).astype(np.uint64)
    out["npages"] = np.minimum(out["npages"] - skip, MERGE_MAX)
    out["vpn"] += skip
    out["offset"] = np.where(out["offset"] == ZERO_PAGE, out["offset"], out["offset"] + skip)
    return out
