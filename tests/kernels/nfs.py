"""An NFS server (version 3, over TCP) of one file, which answers a read when it is told to."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import suppress

MOUNT, NFS = 100005, 100003
ROOT, FILE = b"root", b"file"
NULL, GETATTR, LOOKUP, ACCESS, READ, FSSTAT, FSINFO, PATHCONF = 0, 1, 3, 4, 6, 18, 19, 20
RPC_CALL, RPC_REPLY = 0, 1
PROC_UNAVAIL = 3
LAST = 1 << 31
"""A record on the wire is one fragment: a word with its length, and this."""


def opaque(data: bytes) -> bytes:
    """As XDR has it."""
    return struct.pack(">I", len(data)) + data + bytes(-len(data) % 4)


def unpack_opaque(data: bytes) -> tuple[bytes, bytes]:
    """It, and what follows it."""
    (length,) = struct.unpack_from(">I", data)
    return data[4 : 4 + length], data[4 + length + -length % 4 :]


class SlowServer:
    """Listens at `port` of 127.0.0.1 and serves mounting, too. `asked` is set when a read has come; none is answered
    before `answer` is set."""

    def __init__(self, content: bytes) -> None:
        self.asked, self.answer = threading.Event(), threading.Event()
        self._content = content
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def options(self) -> str:
        """For mount(2)."""
        return (
            f"vers=3,proto=tcp,mountproto=tcp,nolock,soft,timeo=6000,port={self.port},mountport={self.port},"
            "addr=127.0.0.1,mountaddr=127.0.0.1,mountvers=3"
        )

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        sending = threading.Lock()
        with suppress(OSError, struct.error), connection, connection.makefile("rb") as stream:
            while header := stream.read(4):
                (length,) = struct.unpack(">I", header)
                call = stream.read(length & ~LAST)
                # A read waits, and what comes after it does not.
                threading.Thread(target=self._reply, args=(connection, sending, call), daemon=True).start()

    def _reply(self, connection: socket.socket, sending: threading.Lock, call: bytes) -> None:
        xid, kind, _, program, _, procedure = struct.unpack_from(">6I", call)
        if kind != RPC_CALL:
            return
        rest = call[24:]
        for _ in range(2):  # who calls, and how that is proved
            rest = unpack_opaque(rest[4:])[1]
        result = self._mount(procedure) if program == MOUNT else self._nfs(procedure, rest)
        status = PROC_UNAVAIL if result is None else 0
        record = struct.pack(">6I", xid, RPC_REPLY, 0, 0, 0, status) + (result or b"")
        with sending, suppress(OSError):
            connection.sendall(struct.pack(">I", len(record) | LAST) + record)

    def _mount(self, procedure: int) -> bytes:
        return struct.pack(">I", 0) + opaque(ROOT) + struct.pack(">2I", 1, 1) if procedure == 1 else b""

    def _attributes(self, handle: bytes) -> bytes:
        kind, mode, number = (1, 0o644, 2) if handle == FILE else (2, 0o755, 1)
        size = len(self._content) if handle == FILE else 4096
        return struct.pack(">5I2Q2I2Q6I", kind, mode, 1, 0, 0, size, size, 0, 0, 1, number, *(1, 0) * 3)

    def _nfs(self, procedure: int, rest: bytes) -> bytes | None:
        if procedure == NULL:
            return b""
        handle, rest = unpack_opaque(rest)
        attributes = self._attributes(handle)
        known = struct.pack(">2I", 0, 1) + attributes  # NFS3_OK, and what the object is
        if procedure == GETATTR:
            return struct.pack(">I", 0) + attributes
        if procedure == LOOKUP:
            return struct.pack(">I", 0) + opaque(FILE) + struct.pack(">I", 1) + self._attributes(FILE) + bytes(4)
        if procedure == ACCESS:
            return known + rest[:4]
        if procedure == READ:
            self.asked.set()
            self.answer.wait()
            at, count = struct.unpack_from(">QI", rest)
            data = self._content[at : at + count]
            return known + struct.pack(">2I", len(data), at + count >= len(self._content)) + opaque(data)
        if procedure == FSSTAT:
            return known + struct.pack(">6QI", *(1 << 30,) * 6, 0)
        if procedure == FSINFO:
            return known + struct.pack(">7IQ3I", *(1 << 17, 1 << 17, 4096) * 2, 4096, 1 << 40, 0, 1, 0x18)
        return known + struct.pack(">6I", 1, 255, 1, 1, 0, 1) if procedure == PATHCONF else None
