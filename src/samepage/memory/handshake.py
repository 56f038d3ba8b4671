"""How a process joins: HELLO, WELCOME, READY."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass

from samepage.memory import PAGE_SIZE, AddressSpaceGone, wire
from samepage.memory.conversation import why
from samepage.memory.wire import Op, Packet, Swap, WireError


@dataclass(frozen=True, slots=True)
class Terms:
    """What the service tells an agent in WELCOME. `reserve` in bytes, `section` in pages."""

    reserve: int = 16 << 20
    section: int = 64
    use_swap: bool = False
    flags: int = 0
    """Of `wire.Flags`."""


def greet(sock: socket.socket, hello: Packet, pid: int, terms: Terms, userfaultfd: int) -> str:
    """The first half of `AgentAddressSpace.welcome`: answer `hello`. Returns the name the process gives itself."""
    try:
        comm = _check_hello(hello)
        body = wire.pack(wire.WELCOME, wire.VERSION, terms.flags, terms.reserve, terms.section, terms.use_swap)
        wire.send(sock, Op.WELCOME, hello.seq, body, fd=userfaultfd)
    except (WireError, OSError) as e:
        raise AddressSpaceGone(f"process {pid} did not join: {why(e)}") from e
    return comm


def ready(sock: socket.socket, pid: int) -> dict[str, int]:
    """The second half: wait for READY of a process that was greeted. Returns what it says of itself."""
    try:
        return _check_ready(wire.recv_plain(sock))
    except (WireError, OSError) as e:
        raise AddressSpaceGone(f"process {pid} did not join: {why(e)}") from e


def asked_domain(hello: Packet, pid: int) -> str:
    """The merge domain that a process asks for; "": none. AddressSpaceGone when it does not speak this protocol."""
    try:
        _check_hello(hello)
        return _printable(hello.reader().one(wire.HELLO)["domain"])
    except WireError as e:
        raise AddressSpaceGone(f"process {pid} did not join: {why(e)}") from e


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
    return _printable(said["comm"])


def _printable(said: bytes) -> str:
    name = said.rstrip(b"\0").decode("utf-8", "replace")
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
