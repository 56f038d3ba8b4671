"""Asking a process: requests over a SOCK_SEQPACKET socket, one after the other, and what happens if an answer does not
come.

The agent runs inside a process that may be anyone's. So an answer that is late or out of order ends the connection, and
so does anything that the caller finds wrong with it (`answers`); ksmd sees `AddressSpaceGone`. An honest agent that was
cut off by mistake joins again by itself.
"""

from __future__ import annotations

import contextlib
import errno
import math
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from samepage.memory import AddressSpaceGone, AddressSpaceSilent, ScanResult, wire
from samepage.memory.segments import SegmentError
from samepage.memory.wire import Op, Packet, WireError
from samepage.process.halt import SILENT, TRACED, Halt, Work, agent_thread, halt_of, kept_from_cpu, work_of
from samepage.process.identity import Identity, has_ended, identify

TIMEOUT = 10.0
"""How long an agent has for one answer, in seconds."""

LONGEST = 60.0
"""The same, for one whose process the kernel sees at work: on a machine with far more work than CPUs, or while the
process forks a hundred children, an agent may not come to answer. After `TIMEOUT` nobody waits for it any more."""

T = TypeVar("T")

LOOK_EVERY = 0.05
"""How often, in seconds, it asks whether to go on waiting for an answer."""

CANCEL_PATIENCE = 1.0
"""How long a process that is not stopped has to answer after a cancellation, in seconds."""

TRACER_PATIENCE = 0.01
"""Seconds between two looks that tell a process which a tracer holds from one that it lets go on at once."""

NOTHING_LOST = (Op.AREAS, Op.SCAN, Op.RESTORE, Op.MAP_COUNT, Op.HEADROOM, Op.PROVE)
"""What a process may have been asked when it fell silent: the answer is taken in, or asked for again. After any other
request ksmd could not tell what the process did."""

ENDED = "it ended"
"""What became of a process that closed its connection."""


@dataclass(slots=True, eq=False)
class _Request:
    """One that was sent. `ends`: until when its answer is waited for, as soon as it is its turn, `patience` seconds
    longer than usual; `last`: until when it is waited for at the most; `before`: what the process had done by then;
    `scan`: how to understand it, if it is a scan."""

    op: Op
    seq: int
    patience: float = 0.0
    scan: Callable[[Packet], ScanResult] | None = None
    ends: float = math.inf
    last: float = math.inf
    before: Work | None = None

    def begin(self) -> None:
        """From now on its answer is waited for."""
        self.ends = time.monotonic() + TIMEOUT + self.patience
        self.last = self.ends - TIMEOUT + LONGEST


class Conversation:
    """Several threads may ask, and no request waits for the answer to the one before: the process has it at hand when
    it is done with that. Answers come in the order of requests. After the first `AddressSpaceGone` every call
    raises it. `close` is for whoever made the connection: until then the descriptor stays valid, so that a
    poll on it sees the hangup and no other connection can be given its number.
    """

    def __init__(self, sock: socket.socket, pid: int, identity: Identity | None) -> None:
        self.pid = pid
        self.doubtful = False
        """Whether it sent a descriptor of a kind that no agent sends."""
        self.hurry = math.inf
        """After so many seconds without an answer the process counts as silent, whether it can run or not, and nobody
        waits for it."""
        self.misplaced: Callable[[], str] = lambda: ""
        """Why it does not belong in its merge domain any more; "" if it does. OSError: it has ended."""
        self._sock = sock
        self._identity = identity
        self._asking = threading.Condition()  # held to send, so that requests are sent in the order of their numbers
        self._seq = 0
        self._unanswered: deque[_Request] = deque()
        self._owed: deque[_Request] = deque()  # nobody waits for these answers any more: the process is silent
        self._silence = ""
        self._thread = 0
        self._starved = 0.0
        self._gone: str | None = None
        self._cancelled: Callable[[], bool] | None = None
        sock.settimeout(LOOK_EVERY)

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
        """Why it cannot be asked anything any more; `ENDED` if it ended by itself."""
        return self._gone

    def close(self, closing: Callable[[socket.socket], None] = socket.socket.close) -> None:
        """Hang up and give the descriptor back, by `closing` it."""
        self.hang_up()
        with self._asking:
            self._asking.wait_for(lambda: not self._unanswered)
            closing(self._sock)

    def is_there(self) -> bool:
        try:
            return self._identity is None or (self._identity.is_of(identify(self.pid)) and not has_ended(self.pid))
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
        self._thread = self._thread or agent_thread(self.pid)
        halt = halt_of(self.pid, self._thread)
        return halt if halt is None or self.is_there() else None

    def starved(self) -> float:
        self._thread = self._thread or agent_thread(self.pid)
        before, self._starved = self._starved, kept_from_cpu(self.pid, self._thread)
        return max(0.0, self._starved - before)

    def catch_up(self) -> tuple[str, list[ScanResult]]:
        found: list[ScanResult] = []
        ready = select.poll()
        ready.register(self._sock, select.POLLIN)
        while self._owed:
            owed = self._owed[0]
            if not ready.poll(0):
                self._silence = self.halted() or SILENT
                if self._silence != SILENT:
                    owed.begin()
                elif time.monotonic() >= owed.ends and not self._may_be_late(owed):
                    raise self.lost("no answer in time")
                return self._silence, found
            with self._answer(owed, wire.recv_plain if owed.op != Op.DONATE else wire.recv_memfd) as answer:
                if owed.op not in NOTHING_LOST:
                    raise WireError(f"it was {self._silence} in the middle of a request, and joins again")
                if owed.scan is not None:
                    found.append(owed.scan(answer))
            self._owed.popleft()
            if self._owed:
                self._owed[0].begin()
        return self.halted(), found

    def _may_be_late(self, request: _Request) -> bool:
        """Whether the process has a while longer for an answer that should have come: it was at work."""
        now = time.monotonic()
        work, before = work_of(self.pid, self._thread), request.before
        request.ends, request.before = now + TIMEOUT, work
        return now < request.last and work is not None and work.gets_on(before) and self.is_there()

    @contextlib.contextmanager
    def interruptible(self, cancelled: Callable[[], bool]) -> Iterator[None]:
        self._cancelled = cancelled
        try:
            yield
        finally:
            self._cancelled = None

    def verify(self) -> None:
        if self._gone is not None:
            raise self.lost(self._gone)
        if self._identity is not None:
            try:
                changed = self._identity.differs(identify(self.pid))
                # The kernel tells nobody the namespace of a process that just ended.
                changed = ENDED if changed and has_ended(self.pid) else changed
            except OSError:
                changed = ENDED
            if changed:
                raise self.lost(changed)

    @contextlib.contextmanager
    def ask(
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
            raise self.lost(why(e)) from e
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
                raise self.lost(self._gone)
            if self._owed:
                raise AddressSpaceSilent(self.pid, self._silence)
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
                    raise AddressSpaceSilent(self.pid, self._silence)
            request.begin()
            return self._insist(lambda: recv(self._sock), request.ends, request.patience, request)
        except AddressSpaceSilent as e:
            with self._asking:
                self._owed.append(request)
                self._silence = e.state
            raise
        finally:
            with self._asking:
                self._unanswered.remove(request)
                self._asking.notify_all()

    def _insist(self, do: Callable[[], T], ends: float, patience: float = 0.0, request: _Request | None = None) -> T:
        """Do something with the socket. Raises TimeoutError at `ends`, or a while after a cancellation: not at once,
        because without the answer everything would have to be asked anew. Raises AddressSpaceSilent as soon as the
        process is seen not to run; or at `ends`, if the answer to `request` may be late."""
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
                    if request is not None and not called_off and self._may_be_late(request):
                        raise AddressSpaceSilent(self.pid, SILENT) from None
                    raise
            halt = self._halt()
            if request is not None and request.before is None:
                request.before = work_of(self.pid, self._thread)
            if (halt is not None and halt == before) or now >= hurries:
                raise AddressSpaceSilent(self.pid, halt.why if halt else SILENT)
            before = halt

    def lost(self, why: str) -> AddressSpaceGone:
        """Hang up; returns what to raise."""
        self.hang_up(why)
        return AddressSpaceGone(f"process {self.pid}: {self._gone}", ended=self._gone == ENDED)


def why(e: Exception) -> str:
    """Why a connection ended, in words."""
    if isinstance(e, ConnectionError):
        return ENDED
    if isinstance(e, TimeoutError):
        return "no answer in time"
    return e.strerror if isinstance(e, OSError) and e.strerror else str(e)
