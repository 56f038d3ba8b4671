"""Control connections: one JSON object a packet, on the same socket the agents join through.

A request is `{"op": ..., ...}`. The answer is one packet or several; the last has `"ok"`: true with what was
asked for, or false with `"errno"` (a name) and `"error"` (one sentence). `unmerge` sends `{"progress": ...}`
before the last; `status` sends long lists in parts.

The client's half is here, too. Nothing in this module needs numpy, since commands should answer at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Annotated, Any, Protocol

import msgspec

from samepage.service import ksm_files
from samepage.service.engine import Answer, Cancelled, Progress
from samepage.service.sockets import Caller, ControlError, peer

PACKET_MAX = 128 << 10
"""The most bytes in a control packet."""

ROWS_MAX = 100
"""How many processes one packet of a `status` answer has."""

PIDS_MAX = 10000
"""The most processes in the one packet of a `processes` answer."""

BLAMED_MAX = 5
"""The most processes that an error names."""

STARVED_PATIENCE = 60.0
"""Seconds more that a service has for an answer as long as its threads wait for a CPU most of the time."""

CANCEL_PATIENCE = 2.0
"""Seconds that a service has for its last packet after a cancellation."""

Page = Annotated[int, msgspec.Meta(ge=0, lt=1 << 52)]
"""A page number, or a number of pages."""


class Status(msgspec.Struct, tag_field="op", tag="status", forbid_unknown_fields=True):
    """Counters, also of each engine, a row for every process, and one for every memory cgroup of them; to a user who
    does not own the service, those of their own processes. `brief`: not what is available to each, for which they have
    to be asked."""

    brief: bool = False


class Stats(msgspec.Struct, tag_field="op", tag="stats", forbid_unknown_fields=True):
    """Counters; to a user who does not own the service, those of their own processes."""


class Get(msgspec.Struct, tag_field="op", tag="get", forbid_unknown_fields=True):
    """One knob, or all."""

    knob: str | None = None


class Set(msgspec.Struct, tag_field="op", tag="set", forbid_unknown_fields=True):
    """Change a knob. `run` = 2 comes back when everything is unmerged, or could not be."""

    knob: str
    value: str


class Unmerge(msgspec.Struct, tag_field="op", tag="unmerge", forbid_unknown_fields=True):
    """Unmerge these processes, or all."""

    pids: list[int] = []


class Merge(msgspec.Struct, tag_field="op", tag="merge", forbid_unknown_fields=True):
    """Merge `npages` pages from `vpn` on now, of process `pid`, or with 0 of the caller."""

    vpn: Page
    npages: Page
    pid: int = 0


class Files(msgspec.Struct, tag_field="op", tag="files", forbid_unknown_fields=True):
    """The contents of the files of /sys/kernel/mm/ksm, all of one moment; or of those of /proc/`pid`."""

    pid: int | None = None


class Processes(msgspec.Struct, tag_field="op", tag="processes", forbid_unknown_fields=True):
    """Ask which processes have joined: `pids`, at most `PIDS_MAX` of them."""


class Introduce(msgspec.Struct, tag_field="op", tag="introduce", forbid_unknown_fields=True):
    """Report every process that joins from now on: `{"introducing": true}`, then a `{"joined": pid}` for each. The
    process takes part once the client has sent a packet in answer."""


class Write(msgspec.Struct, tag_field="op", tag="write", forbid_unknown_fields=True):
    """What writing `data` to a file of /sys/kernel/mm/ksm does. As `Set`, with the kernel's ways to write a value."""

    file: str
    data: str


Request = Status | Stats | Get | Set | Unmerge | Merge | Files | Processes | Introduce | Write
_decode = msgspec.json.Decoder(Request)
_encode = msgspec.json.Encoder()


Arrivals = queue.SimpleQueue[tuple[int, threading.Event]]
"""Processes that are about to join, each of which waits until its event is set."""


class Controlled(Protocol):
    """What control requests act on (`samepage.service.engine.Engines`)."""

    def counters(self, owner: str | None = None) -> dict[str, Any]: ...
    def by_engine(self, owner: str | None = None) -> dict[str, dict[str, Any]]: ...
    def rows(self) -> list[Answer]: ...
    def commitments(self) -> tuple[list[Answer], list[Answer]]: ...
    def files(self) -> dict[str, str]: ...
    def row(self, pid: int) -> Answer | None: ...
    def pids(self) -> list[int]: ...
    def introductions(self) -> AbstractContextManager[Arrivals]: ...
    def get(self, knob: str) -> str: ...
    def knobs(self) -> dict[str, str]: ...
    def set(self, knob: str, value: str, cancelled: Cancelled) -> None: ...
    def unmerge(self, pids: list[int], progress: Progress, cancelled: Cancelled) -> Answer: ...
    def merge(self, pid: int, vpn: int, npages: int, owner: str | None = None) -> Answer: ...


def handle(sock: socket.socket, data: bytes, caller: Caller, scanner: Controlled, owner: int) -> None:
    """Answer one request. Raises OSError if the client is gone, does not read, or sent too much."""
    if len(data) > PACKET_MAX:
        raise OSError(errno.EMSGSIZE, f"a request of more than {PACKET_MAX} bytes")
    for answer in answers(data, caller, scanner, owner, sock):
        sock.send(_encode.encode(answer), socket.MSG_NOSIGNAL)


def answers(data: bytes, caller: Caller, scanner: Controlled, owner: int, sock: socket.socket) -> Iterator[Answer]:
    """The packets that answer the request in `data`. `owner` is the user the service runs as."""
    try:
        request = _decode.decode(data)
        _may(request, caller, owner)
        yield from _perform(request, caller, scanner, owner, sock)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        yield refusal(errno.EINVAL, f"not a request: {e}")
    except OSError as e:
        yield refusal(e.errno or errno.EIO, e.strerror or str(e))


def refusal(code: int, why: str) -> Answer:
    return {"ok": False, "errno": errno.errorcode.get(code, str(code)), "error": why}


def _may(request: Request, caller: Caller, owner: int) -> None:
    """Whether the caller may do that. Only the service's owner and root may look at others' processes or change
    anything. Everybody may ask for the counters of their own domain and the rows of their own processes, and have their
    own process merged."""
    if caller.uid in (0, owner) or isinstance(request, Stats | Status):
        return
    if isinstance(request, Merge) and request.pid in (0, caller.pid):
        return
    raise PermissionError(
        errno.EACCES, "this service belongs to another user: only `samepage status` may be asked of it"
    )


def _perform(
    request: Request, caller: Caller, scanner: Controlled, owner: int, sock: socket.socket
) -> Iterator[Answer]:
    match request:
        case Status(brief=brief):
            whose = None if caller.uid in (0, owner) else _owner(caller, sock)
            if brief or whose is not None:
                rows, groups = scanner.rows(), list[dict[str, Any]]()
            else:
                rows, groups = scanner.commitments()
            rows = [row for row in rows if whose in (None, row["owner"])]
            counters = scanner.counters(whose)
            for start in range(0, len(rows), ROWS_MAX):
                yield {"processes": rows[start : start + ROWS_MAX]}
            for start in range(0, len(groups), ROWS_MAX):
                yield {"cgroups": groups[start : start + ROWS_MAX]}
            yield {"ok": True, "counters": counters, "engines": scanner.by_engine(whose)}
        case Stats():
            yield {
                "ok": True,
                "counters": scanner.counters(None if caller.uid in (0, owner) else _owner(caller, sock)),
            }
        case Get(knob=None):
            yield {"ok": True, "knobs": scanner.knobs()}
        case Get(knob=str(knob)):
            yield {"ok": True, "knobs": {knob: scanner.get(knob)}}
        case Set(knob=knob, value=value):
            scanner.set(knob, value, lambda: client_gone(sock))
            yield {"ok": True}
        case Unmerge(pids=pids):
            yield scanner.unmerge(pids, lambda done: _progress(sock, done), lambda: client_gone(sock))
        case Files(pid=None):
            yield {"ok": True, "files": scanner.files()}
        case Files(pid=int(pid)):
            yield {"ok": True, "files": ksm_files.process_texts(scanner.row(pid))}
        case Processes():
            yield {"ok": True, "pids": scanner.pids()[:PIDS_MAX]}
        case Introduce():
            yield from _introduce(scanner, sock)
        case Write(file=file, data=data):
            scanner.set(file, ksm_files.value(file, data), lambda: client_gone(sock))
            yield {"ok": True}
        case Merge(vpn=vpn, npages=npages, pid=pid):
            whose = None if caller.uid in (0, owner) else _owner(caller, sock)
            yield {"ok": True} | scanner.merge(pid or caller.pid, vpn, npages, whose)


def _owner(caller: Caller, sock: socket.socket) -> str:
    """Whose processes the caller may know of: those of the user who connected, in the namespaces that process is in now
    (`ProcessRow.owner`)."""
    from samepage.process.identity import domain_of, identify_peer

    try:
        return str(domain_of(caller.uid, identify_peer(sock, caller.pid, caller.connected)))
    except OSError:
        raise ProcessLookupError(errno.ESRCH, "it cannot be seen who asks") from None


def _introduce(scanner: Controlled, sock: socket.socket) -> Iterator[Answer]:
    """Until the client goes."""
    with scanner.introductions() as arrivals:
        yield {"introducing": True}
        while not client_gone(sock):
            with contextlib.suppress(queue.Empty):
                pid, known = arrivals.get(timeout=1.0)
                yield {"joined": pid}
                sock.recv(PACKET_MAX)
                known.set()
    yield {"ok": True}


def _progress(sock: socket.socket, done: Answer) -> None:
    # A client that does not read, or went: the unmerge does not wait for it; client_gone() will tell.
    with contextlib.suppress(OSError):
        sock.send(_encode.encode({"progress": done}), socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)


def client_gone(sock: socket.socket) -> bool:
    """Whether the client closed its end, or only its sending half, which asks for a cancellation."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


class Client:
    """A control connection to the service at `path`, for one request after the other.

    Raises `ControlError` with the true errno; here if nobody listens at `path`, or if a user does who is neither
    root nor this one.
    """

    def __init__(self, path: str, timeout: float | None = 10.0) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.settimeout(timeout)
        self._cancelled = 0.0  # when
        try:
            self._sock.connect(path)
            if peer(self._sock).uid not in (0, os.getuid()):
                raise PermissionError(errno.EACCES, "another user listens there")
        except OSError as e:
            self._sock.close()
            raise ControlError(e.errno or errno.EIO, _unreachable(path, e)) from e

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._sock.close()

    def stream(self, op: str, **arguments: Any) -> Iterator[Answer]:
        """Yield every packet of the answer, the last of which has `"ok"`."""
        try:
            self._sock.send(_encode.encode({"op": op} | arguments), socket.MSG_NOSIGNAL)
            while True:
                data = self._receive()
                if not data:
                    raise ControlError(errno.EPIPE, "the service ended before it answered")
                answer = msgspec.json.decode(data, type=dict[str, Any])
                yield answer
                if "ok" in answer:
                    return
        except TimeoutError as e:
            raise ControlError(errno.ETIMEDOUT, "the service does not answer") from e
        except ConnectionError as e:
            raise ControlError(errno.EPIPE, "the service ended before it answered") from e
        except msgspec.DecodeError as e:
            raise ControlError(errno.EPROTO, f"the service talks nonsense: {e}") from e

    def _receive(self) -> bytes:
        """Receive one packet. After a cancellation it waits for a while only, since the service may be stopped."""
        while self._sock.gettimeout() is None and not select.select([self._sock], [], [], 0.1)[0]:
            if self._cancelled and time.monotonic() > self._cancelled + CANCEL_PATIENCE:
                raise TimeoutError
        try:
            return self._sock.recv(PACKET_MAX)
        except TimeoutError:
            return self._receive_late()

    def _receive_late(self) -> bytes:
        """Receive a packet that did not come in time, if that is for want of a CPU: where others are busier, a service
        of a lower priority gets a CPU now and then, and each of its threads waits for the one that has Python's lock.
        """
        step, service = min(1.0, self._sock.gettimeout() or 1.0), peer(self._sock).pid
        end = time.monotonic() + STARVED_PATIENCE
        while time.monotonic() < end:
            before = waited_for_cpu(service)
            if select.select([self._sock], [], [], step)[0]:
                return self._sock.recv(PACKET_MAX)
            if waited_for_cpu(service) - before < step / 2:
                break
        raise TimeoutError

    def ask(self, op: str, **arguments: Any) -> Answer:
        """Return the last packet of the answer, with the lists of the earlier ones in it. Raises what the service
        refuses."""
        lists: dict[str, list[Any]] = {}
        answer: Answer = {}
        for answer in self.stream(op, **arguments):
            for key, value in answer.items():
                if isinstance(value, list):
                    lists.setdefault(key, []).extend(value)
        if not answer["ok"]:
            raise ControlError(getattr(errno, answer["errno"], errno.EIO), answer["error"])
        return answer | lists

    def acknowledge(self) -> None:
        """Confirm that the last packet of a stream was processed."""
        self._sock.send(b"{}", socket.MSG_NOSIGNAL)

    def cancel(self) -> None:
        """Ask a running `unmerge` to end. Its last packet still comes; no other request can follow."""
        self._cancelled = time.monotonic()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)


def waited_for_cpu(pid: int) -> float:
    """Seconds that the threads of a process were ready to run and had to wait, all together."""
    waited = 0
    with contextlib.suppress(OSError):
        for tid in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError, IndexError), open(f"/proc/{pid}/task/{tid}/schedstat") as file:
                waited += int(file.read().split()[1])
    return waited / 1e9


def blamed(failed: list[Answer]) -> str:
    """Which processes could not be unmerged for reasons of their own, in words; "" if there are none."""
    why = {
        "ETIMEDOUT": "does not answer{}, and is unmerged as soon as it does",
        "EFAULT": "has pages that cannot be mapped any more",
    }
    rows = [row for row in failed if row["errno"] in why or "why" in row]
    names = [
        f"process {row['pid']} ({row['comm']}) "
        + (row.get("why") or why[row["errno"]].format(f" (it is {row['state']})" if row["state"] else ""))
        for row in rows[:BLAMED_MAX]
    ]
    if len(rows) > BLAMED_MAX:
        names.append(f"and {len(rows) - BLAMED_MAX} more")
    return "; ".join(names)


def not_unmerged(code: int, unmerged: int, left: int, why: str, failed: list[Answer]) -> OSError:
    """The error of writing 2 to `run` when `left` pages remain merged. `why` may be ""."""
    text = f"{os.strerror(code)}: {unmerged} pages unmerged, {left} remain merged"
    return OSError(code, "; ".join(filter(None, [text, why, blamed(failed), "run is 0"])))


def _unreachable(path: str, e: OSError) -> str:
    if isinstance(e, FileNotFoundError | ConnectionRefusedError):
        return f"no service at {path}: start `samepage daemon`, or name another with --socket"
    return f"cannot reach the service at {path}: {e.strerror or e}"
