"""The service's side of the wire; `agent/base/wire.h` is the other, and explains who speaks when.

One message is one SOCK_SEQPACKET packet of at most `MSG_MAX` bytes: a header (`HDR`), then what its op says. A
descriptor rides on the packet it belongs to. Anything else that a peer sends is a `WireError`. The only other error
from here is the `OSError` of a broken or silent socket.
"""

from __future__ import annotations

import array
import fcntl
import functools
import os
import socket
import struct
import threading
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Any

import numpy as np
import numpy.typing as npt

from samepage.memory import AREA, EXTENT, RUN, STALLS_US

MAGIC = 0x45504D53
VERSION = 9
MSG_MAX = 128 << 10
"""Bytes of the largest packet, header included."""


class Op(IntEnum):
    """`enum sp_op`."""

    HELLO = 1
    WELCOME = 2
    READY = 3
    AREAS = 4
    SCAN = 5
    DONATE = 6
    MERGE = 7
    BREAK = 8
    MAP_COUNT = 9
    HEADROOM = 10
    RESTORE = 11
    PROVE = 12


class Flags(IntFlag):
    """`enum sp_welcome_flags`: for tests and measurements, what an older kernel would do."""

    TRUNCATE_HASH = 1
    """Keep 8 bits of every checksum, so that they collide."""
    NO_MOVE = 2
    """No UFFDIO_MOVE."""
    NO_TRACKING = 4
    """Hash everything at every scan."""
    TWO_NODES = 8
    """Not an older kernel, but another machine: pages of odd numbers are on a second NUMA node."""
    NO_MAP_QUERY = 16
    """Read /proc/self/maps for each mapping."""
    SWAP_WP = 128
    """Not an older kernel: the user chose to swap by write-protection."""
    UNPINNED = 256
    """Not an older kernel: as if there were a file system that reads into pages without pinning them (NFS)."""
    LIKE_6_1 = 32
    """NO_MOVE, NO_TRACKING, NO_MAP_QUERY; no PAGEMAP_SCAN; UFFDIO_WRITEPROTECT in one mapping only."""
    LIKE_5_10 = 64
    """LIKE_6_1; no MADV_POPULATE_WRITE, and for mappings of files neither MREMAP_DONTUNMAP nor write-protection."""


class Swap(IntEnum):
    """`enum sp_swap`: how an agent swaps pages under the application's threads."""

    NONE = 0
    MOVE = 1
    WP = 2
    QUIET = 3
    QUIET_WP = 4


HDR = np.dtype([("op", "<u4"), ("seq", "<u4"), ("error", "<i4"), ("len", "<u4")])
HELLO = np.dtype(
    [("magic", "<u4"), ("version", "<u4"), ("pid", "<u4"), ("page_size", "<u4"), ("comm", "S16"), ("domain", "S32")],
)
WELCOME = np.dtype(
    [("version", "<u4"), ("flags", "<u4"), ("reserve", "<u8"), ("section", "<u4"), ("use_swap", "<u4")],
)
READY = np.dtype([("swap", "<u4"), ("tracking", "<u4"), ("zero_checksum", "<u8"), ("unnamed", "<u4"), ("pad", "<u4")])
AREAS = np.dtype([("seq", "<u8"), ("next_vpn", "<u8"), ("merge_any", "<u4"), ("pad", "<u4")])
SCAN = np.dtype([("vpn", "<u8"), ("budget", "<u8"), ("end", "<u8"), ("flags", "<u4"), ("pad", "<u4")])
STALLS = np.dtype([("ns", "<u8"), ("count", "<u4", len(STALLS_US) + 1)])
SCANNED = np.dtype(
    [
        ("next_vpn", "<u8"),
        ("areas_seq", "<u8"),
        ("cpu_ns", "<u8"),
        ("nruns", "<u4"),
        ("nhashed", "<u4"),
        ("forked_ms", "<u4"),
        ("pad", "<u4"),
        ("stalls", STALLS),
    ]
)
DONE = np.dtype([("cpu_ns", "<u8"), ("npages", "<u8")])
KEY_SIZE, PROOF_SIZE = 32, 16
PROVE = np.dtype([("key", f"S{KEY_SIZE}")])
"""Followed by the number of each page."""
BROKEN = np.dtype(
    [
        ("pages_unmerged", "<u8"),
        ("pages_remaining", "<u8"),
        ("bytes_needed", "<u8"),
        ("bytes_available", "<u8"),
        ("cpu_ns", "<u8"),
        ("error", "<i4"),
        ("unseen", "<u4"),
    ],
)
RESTORED = np.dtype([("pages_restored", "<u8"), ("pages_left", "<u8"), ("cpu_ns", "<u8")])
MAP_COUNT = np.dtype([("used", "<u8"), ("limit", "<u8")])
HEADROOM = np.dtype([("available", "<u8")])

STRUCTS: dict[str, np.dtype[np.void]] = {
    "sp_hdr": HDR,
    "sp_hello": HELLO,
    "sp_welcome": WELCOME,
    "sp_ready": READY,
    "sp_area": AREA,
    "sp_areas": AREAS,
    "sp_scan": SCAN,
    "sp_run": RUN,
    "sp_stalls": STALLS,
    "sp_scanned": SCANNED,
    "sp_extent": EXTENT,
    "sp_done": DONE,
    "sp_prove": PROVE,
    "sp_broken": BROKEN,
    "sp_restored": RESTORED,
    "sp_map_count": MAP_COUNT,
    "sp_headroom": HEADROOM,
}
"""Every struct of `agent/base/wire.h` under its C name."""

BODY_MAX = MSG_MAX - HDR.itemsize
"""Bytes that follow the header in the largest packet."""


class WireError(ValueError):
    """A packet that makes no sense."""


class Doubtful(WireError):
    """A descriptor of something other than a memfd. Closing it may take for ever, and we hold the last reference."""


class Disconnected(ConnectionError):
    """The peer closed its end."""


_CODES = {"<u4": "I", "<i4": "i", "<u8": "Q"}


@functools.cache
def _struct(dtype: np.dtype[np.void]) -> struct.Struct:
    """For single structs, which take numpy ten times as long."""
    kinds = [dtype[name] for name in dtype.names or ()]
    return struct.Struct("<" + "".join(_CODES.get(kind.str, f"{kind.itemsize}s") for kind in kinds))


def pack(dtype: np.dtype[np.void], *values: Any) -> bytes:
    """One struct of `dtype` with its fields in order."""
    return _struct(dtype).pack(*values)


@dataclass(slots=True)
class Reader:
    """Takes a body apart from its beginning; whatever is short or left over is a `WireError`."""

    body: memoryview
    at: int = 0

    def take(self, dtype: npt.DTypeLike, count: int) -> npt.NDArray[Any]:
        """The next `count` elements of `dtype`, read-only, sharing the packet's memory."""
        at = self._pass(np.dtype(dtype).itemsize * count)
        return np.frombuffer(self.body, dtype, count, at) if count else np.empty(0, dtype)

    def one(self, dtype: np.dtype[np.void]) -> dict[str, Any]:
        """The next struct, as Python values by field name. Bytes come with the zeros that fill them up."""
        at = self._pass(dtype.itemsize)
        return dict(zip(dtype.names or (), _struct(dtype).unpack_from(self.body, at), strict=True))

    def rest(self, dtype: np.dtype[np.void]) -> npt.NDArray[np.void]:
        """All that is left, as elements of `dtype`."""
        count, odd = divmod(len(self.body) - self.at, dtype.itemsize)
        if odd:
            raise WireError(f"{odd} bytes too many")
        return self.take(dtype, count)

    def _pass(self, size: int) -> int:
        """Where the next `size` bytes begin."""
        if size > len(self.body) - self.at:
            raise WireError(f"{len(self.body)} bytes are too few")
        at, self.at = self.at, self.at + size
        return at

    def end(self) -> None:
        """Check that nothing is left."""
        if self.at != len(self.body):
            raise WireError(f"{len(self.body) - self.at} bytes too many")


LOST = -2


@dataclass(slots=True)
class Packet:
    """One message. `fd` (or -1) belongs to whoever holds the packet, until `take_fd` or `close`. It is `LOST` if there
    was one, and this process has no descriptor left for it."""

    op: int
    seq: int
    error: int
    body: memoryview
    fd: int = -1

    def reader(self) -> Reader:
        return Reader(self.body)

    def take_fd(self) -> int:
        fd, self.fd = self.fd, -1
        return fd

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.take_fd())


def encode(op: int, seq: int, body: bytes = b"", error: int = 0) -> bytes:
    """The bytes of one packet. `WireError` when it would not fit into `MSG_MAX`."""
    if len(body) > BODY_MAX:
        raise WireError(f"{len(body)} bytes do not fit into one packet")
    return pack(HDR, op, seq, error, len(body)) + body


def decode(data: bytes) -> Packet:
    """The packet in `data`, without its descriptor. `WireError` when the header is short or its length wrong."""
    if len(data) < HDR.itemsize:
        raise WireError(f"a packet of {len(data)} bytes has no room for a header")
    head = Reader(memoryview(data)).one(HDR)
    body = memoryview(data)[HDR.itemsize :]
    if head["len"] != len(body):
        raise WireError(f"the header promises {head['len']} bytes, {len(body)} came")
    return Packet(head["op"], head["seq"], head["error"], body)


def send(sock: socket.socket, op: int, seq: int, body: bytes = b"", error: int = 0, fd: int = -1) -> None:
    """Send one packet, with `fd` on it unless that is -1. The descriptor stays the caller's."""
    data = encode(op, seq, body, error)
    sent = socket.send_fds(sock, [data], [fd], socket.MSG_NOSIGNAL) if fd >= 0 else sock.send(data, socket.MSG_NOSIGNAL)
    if sent != len(data):
        raise WireError(f"only {sent} of {len(data)} bytes were sent")


_TRUNCATED = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)


def recv_bytes(sock: socket.socket) -> tuple[bytes, int]:
    """One packet as it came, and the descriptor on it or -1.

    Raises `Disconnected` at the end, `WireError` for a packet over `MSG_MAX` or with more than one descriptor,
    and `TimeoutError` after the socket's timeout.
    """
    # Not socket.recv_fds: it ignores its flags argument, and MSG_CMSG_CLOEXEC matters when others fork.
    data, ancillary, flags, _ = sock.recvmsg(MSG_MAX, socket.CMSG_LEN(4), socket.MSG_CMSG_CLOEXEC)
    fds = _descriptors(ancillary)
    if flags & _TRUNCATED or len(fds) > 1:
        for fd in fds:
            os.close(fd)
        what = f"a packet of more than {MSG_MAX} bytes" if flags & socket.MSG_TRUNC else "more than one descriptor"
        raise WireError(what)
    fd = fds[0] if fds else -1
    if not data:
        if fd >= 0:
            os.close(fd)
        raise Disconnected("the peer closed the connection")
    return data, fd


def recv(sock: socket.socket) -> Packet:
    """Receive one packet; raises as `recv_bytes` and `decode` do."""
    data, fd = recv_bytes(sock)
    try:
        packet = decode(data)
    except WireError:
        if fd >= 0:
            os.close(fd)
        raise
    packet.fd = fd
    return packet


def recv_plain(sock: socket.socket) -> Packet:
    """As `recv`, from whom no descriptor is due (see `recv_plain_bytes`)."""
    return decode(recv_plain_bytes(sock))


def recv_plain_bytes(sock: socket.socket) -> bytes:
    """One packet as it came, from whom no descriptor is due. One that comes all the same is left in the socket: whoever
    takes it out may have to wait until it is closed (SO_LINGER), and so may whoever closes the socket."""
    flags = sock.recvmsg(1, 0, socket.MSG_PEEK)[2]
    if flags & socket.MSG_CTRUNC:
        raise Doubtful("a descriptor that nobody asked for")
    return _take_out(sock)


def recv_memfd(sock: socket.socket) -> Packet:
    """As `recv`, from whom a memfd is due. Anything else is closed by a thread of its own, and is `Doubtful`."""
    _, ancillary, flags, _ = sock.recvmsg(1, socket.CMSG_LEN(4), socket.MSG_PEEK | socket.MSG_CMSG_CLOEXEC)
    fds = _descriptors(ancillary)
    try:
        for fd in fds:
            _require_memfd(fd)
        if fds and flags & socket.MSG_CTRUNC:
            raise Doubtful("more than one descriptor")
        # What is thrown away here is one reference of two, so nobody waits for anything.
        packet = decode(_take_out(sock))
    except BaseException:
        for fd in fds:
            _close_aside(fd)
        raise
    packet.fd = fds[0] if fds else LOST if flags & socket.MSG_CTRUNC else -1
    return packet


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> array.array[int]:
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return fds


def _take_out(sock: socket.socket) -> bytes:
    """The next packet without its descriptors."""
    data, _, flags, _ = sock.recvmsg(MSG_MAX)
    if flags & socket.MSG_TRUNC:
        raise WireError(f"a packet of more than {MSG_MAX} bytes")
    if not data:
        raise Disconnected("the peer closed the connection")
    return data


def _require_memfd(fd: int) -> None:
    """Refuse everything but a memfd, by a question that only memfds answer: fstat(2) may wait for a file system in user
    space for ever."""
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as e:
        raise Doubtful(f"no memfd: {e.strerror}") from e


_never_closed: list[int] = []


def _close_aside(fd: int) -> None:
    try:
        threading.Thread(target=os.close, args=(fd,), daemon=True).start()
    except RuntimeError:
        _never_closed.append(fd)  # there is no thread, and ours must not wait
