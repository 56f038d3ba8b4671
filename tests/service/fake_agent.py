"""An agent in Python, over numpy pages that no application uses: honest by default, and any op can be made to lie.

Tests that need a process of its own run this file: `python fake_agent.py SOCKET SEED NPAGES [LIE]` makes NPAGES
pages from SEED (equal seeds, equal pages), joins, and serves until the service hangs up.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import socket
import sys
import time
from collections.abc import Callable

import numpy as np

from samepage.memory import AREA, EXTENT, PAGE_SIZE, RUN, U8, ZERO_PAGE, PageStatus, RunKind, wire
from samepage.memory.proof import expected
from samepage.memory.wire import Op, Packet

BASE_VPN = 0x7F000000
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

Lie = Callable[["FakeAgent", Packet], "tuple[bytes, int] | None"]
"""Answers a request its own way: (the raw packet, a descriptor or -1), or None to say nothing at all."""


NEVER = (1 << 32) - 1
"""It never forked."""


def some_pages(seed: int, npages: int) -> U8:
    return np.random.default_rng(seed).integers(0, 256, (npages, PAGE_SIZE), np.uint8)


def sealed(content: bytes, seals: int = SEALS) -> int:
    fd = os.memfd_create("fake", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


class FakeAgent:
    def __init__(self, sock: socket.socket, pages: U8, lies: dict[Op, Lie] | None = None) -> None:
        self.sock = sock
        self.pages = pages
        self.lies = lies or {}
        self.written = np.ones(len(pages), bool)
        self.merged = np.zeros(len(pages), bool)
        self.areas = np.array([(BASE_VPN, len(pages))], AREA)
        self.headroom = 1 << 40
        self.asked: list[tuple[Op, int]] = []
        self.stalls = b""
        """What it says next of threads that were held up (`wire.STALLS`)."""

    def hello(self, version: int = wire.VERSION, page_size: int = PAGE_SIZE) -> bytes:
        body = wire.pack(wire.HELLO, wire.MAGIC, version, os.getpid(), page_size, b"fake", b"")
        return wire.encode(Op.HELLO, 0, body)

    def join(self) -> Packet:
        """Shake hands; returns what WELCOME said."""
        self.sock.send(self.hello())
        welcome = wire.recv(self.sock)
        zero = self.checksum(np.zeros(PAGE_SIZE, np.uint8))
        wire.send(self.sock, Op.READY, 0, wire.pack(wire.READY, wire.Swap.MOVE, 1, zero, 0, 0))
        return welcome

    def serve(self) -> None:
        """Answer until the service goes."""
        while self.serve_one():
            pass

    def serve_one(self) -> bool:
        """Answer one request; False when the service is gone."""
        try:
            request = wire.recv(self.sock)
        except (wire.Disconnected, OSError):
            self.sock.close()
            return False
        op = Op(request.op)
        self.asked.append((op, len(request.body)))
        answer = self.lies[op](self, request) if op in self.lies else self.honest(request)
        request.close()
        if answer is not None:
            data, fd = answer
            with contextlib.suppress(OSError):
                if fd >= 0:
                    socket.send_fds(self.sock, [data], [fd])
                else:
                    self.sock.send(data)
            if fd >= 0:
                os.close(fd)
        return True

    def honest(self, request: Packet) -> tuple[bytes, int]:
        op = Op(request.op)
        body, fd = getattr(self, f"do_{op.name.lower()}")(request)
        return wire.encode(op, request.seq, body), fd

    def checksum(self, page: U8) -> int:
        return int.from_bytes(hashlib.blake2b(page.tobytes(), digest_size=8).digest(), "little")

    def do_areas(self, request: Packet) -> tuple[bytes, int]:
        start = int(request.reader().take("<u8", 1)[0])
        most = (wire.BODY_MAX - wire.AREAS.itemsize) // AREA.itemsize
        left = self.areas[self.areas["vpn"] >= start]
        more = int(left["vpn"][most]) if len(left) > most else 0
        return wire.pack(wire.AREAS, 1, more, 0, 0) + left[:most].tobytes(), -1

    def do_scan(self, request: Packet) -> tuple[bytes, int]:
        asked = request.reader().one(wire.SCAN)
        start = max(0, asked["vpn"] - BASE_VPN)
        end = max(0, asked["end"] - BASE_VPN)
        todo = np.flatnonzero(self.written[start:end])[: min(asked["budget"], 3000)] + start
        runs = np.zeros(len(todo), RUN)
        runs["vpn"], runs["npages"], runs["kind"] = todo + BASE_VPN, 1, RunKind.HASHED
        self.written[todo] = False
        sums = np.array([self.checksum(self.pages[i]) for i in todo], "<u8")
        left = bool(len(todo)) and bool(self.written[todo[-1] :].any())
        next_vpn = BASE_VPN + int(todo[-1]) + 1 if left else 0
        head = wire.pack(wire.SCANNED, next_vpn, 1, 1000, len(runs), len(sums), NEVER, 0, self.stalls)
        self.stalls = b""
        return head + runs.tobytes() + sums.tobytes(), -1

    def do_donate(self, request: Packet) -> tuple[bytes, int]:
        runs = request.reader().rest(AREA)
        vpns = np.concatenate([np.arange(r["vpn"], r["vpn"] + r["npages"]) for r in runs]).astype(np.int64) - BASE_VPN
        body = wire.pack(wire.DONE, 1000, len(vpns)) + bytes(len(vpns))
        return body, sealed(self.pages[vpns].tobytes())

    def do_prove(self, request: Packet) -> tuple[bytes, int]:
        reader = request.reader()
        key, pages = reader.one(wire.PROVE)["key"], reader.rest(np.dtype([("vpn", "<u8")]))["vpn"].astype(np.int64)
        proofs = b"".join(expected(key, self.pages[vpn - BASE_VPN].tobytes()) for vpn in pages)
        return wire.pack(wire.DONE, 1000, len(pages)) + bytes(len(pages)) + proofs, -1

    def do_merge(self, request: Packet) -> tuple[bytes, int]:
        extents = request.reader().rest(EXTENT)
        status = np.concatenate([self.merge_extent(request.fd, *e.item()) for e in extents])
        return wire.pack(wire.DONE, 1000, len(status)) + status.tobytes(), -1

    def merge_extent(self, fd: int, vpn: int, npages: int, offset: int) -> U8:
        index = vpn - BASE_VPN
        mine = self.pages[index : index + npages]
        if offset == ZERO_PAGE:
            theirs = np.zeros_like(mine)
        else:
            data = os.pread(fd, npages * PAGE_SIZE, offset * PAGE_SIZE)
            theirs = np.frombuffer(data, np.uint8).reshape(npages, PAGE_SIZE)
        equal = (mine == theirs).all(axis=1)
        self.merged[index : index + npages] |= equal
        return np.where(equal, PageStatus.DONE, PageStatus.DIFFERENT).astype(np.uint8)

    def do_break(self, request: Packet) -> tuple[bytes, int]:
        area = request.reader().one(AREA)
        start = max(0, area["vpn"] - BASE_VPN)
        stop = area["vpn"] + area["npages"] - BASE_VPN
        which = np.flatnonzero(self.merged[start:stop]) + start
        if len(which) * PAGE_SIZE > self.headroom:
            sums = (0, len(which), len(which) * PAGE_SIZE, self.headroom)
            return wire.pack(wire.BROKEN, *sums, 0, errno.ENOMEM, 0), -1
        self.merged[which] = False
        return wire.pack(wire.BROKEN, len(which), 0, 0, self.headroom, 0, 0, 0), -1

    def do_restore(self, request: Packet) -> tuple[bytes, int]:
        """Of every run it asks for all pages but one are ordinary memory then."""
        runs = request.reader().rest(AREA)
        npages = int(runs["npages"].sum())
        return wire.pack(wire.RESTORED, npages - len(runs), len(runs), 0), -1

    def do_map_count(self, request: Packet) -> tuple[bytes, int]:
        return wire.pack(wire.MAP_COUNT, 100, 32000), -1

    def do_headroom(self, request: Packet) -> tuple[bytes, int]:
        return wire.pack(wire.HEADROOM, self.headroom), -1


def nothing(agent: FakeAgent, request: Packet) -> None:
    """Hang: no answer, ever."""


def die(agent: FakeAgent, request: Packet) -> None:
    """Close the connection instead of answering."""
    agent.sock.shutdown(socket.SHUT_RDWR)


def exit_now(agent: FakeAgent, request: Packet) -> None:
    """End the whole process instead of answering."""
    os._exit(1)


def garbage(agent: FakeAgent, request: Packet) -> tuple[bytes, int]:
    return b"\xff" * 100, -1


def wrong_seq(agent: FakeAgent, request: Packet) -> tuple[bytes, int]:
    data, fd = agent.honest(request)
    return wire.encode(request.op, request.seq + 1, data[wire.HDR.itemsize :]), fd


def wrong_op(agent: FakeAgent, request: Packet) -> tuple[bytes, int]:
    data, fd = agent.honest(request)
    return wire.encode(Op.HELLO, request.seq, data[wire.HDR.itemsize :]), fd


def too_short(agent: FakeAgent, request: Packet) -> tuple[bytes, int]:
    data, fd = agent.honest(request)
    return wire.encode(request.op, request.seq, data[wire.HDR.itemsize : -1]), fd


def too_long(agent: FakeAgent, request: Packet) -> tuple[bytes, int]:
    data, fd = agent.honest(request)
    return wire.encode(request.op, request.seq, data[wire.HDR.itemsize :] + b"x"), fd


def oversize(agent: FakeAgent, request: Packet) -> tuple[bytes, int]:
    return wire.encode(request.op, request.seq) + b"x" * wire.MSG_MAX, -1


def overlapping_areas(agent: FakeAgent, request: Packet) -> tuple[bytes, int]:
    areas = np.array([(BASE_VPN, 10), (BASE_VPN + 5, 10)], AREA)
    return wire.encode(request.op, request.seq, wire.pack(wire.AREAS, 1, 0, 0, 0) + areas.tobytes()), -1


def unsealed_segment(agent: FakeAgent, request: Packet) -> tuple[bytes, int]:
    data, fd = agent.honest(request)
    content = os.pread(fd, 1 << 30, 0)
    os.close(fd)
    return data, sealed(content, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)


def short_segment(agent: FakeAgent, request: Packet) -> tuple[bytes, int]:
    data, fd = agent.honest(request)
    os.close(fd)
    return data, sealed(b"x" * (PAGE_SIZE - 1))


def no_segment(agent: FakeAgent, request: Packet) -> tuple[bytes, int]:
    data, fd = agent.honest(request)
    os.close(fd)
    return data, -1


def pipe_segment(agent: FakeAgent, request: Packet) -> tuple[bytes, int]:
    data, fd = agent.honest(request)
    os.close(fd)
    end, other = os.pipe()
    os.close(other)
    return data, end


def no_memory(agent: FakeAgent, request: Packet) -> tuple[bytes, int]:
    """No lie: there is no headroom for a single page."""
    agent.headroom = 100
    return agent.honest(request)


def slow(agent: FakeAgent, request: Packet) -> tuple[bytes, int]:
    """No lie either."""
    time.sleep(0.5)
    return agent.honest(request)


LIES: dict[str, dict[Op, Lie]] = {
    "hang": {Op.SCAN: nothing},
    "die": {Op.SCAN: exit_now},
    "garbage": {Op.SCAN: garbage},
    "oversize": {Op.SCAN: oversize},
    "wrong-seq": {Op.SCAN: wrong_seq},
    "short": {Op.SCAN: too_short},
    "overlap": {Op.AREAS: overlapping_areas},
    "unsealed": {Op.DONATE: unsealed_segment},
    "short-segment": {Op.DONATE: short_segment},
    "die-merging": {Op.MERGE: exit_now},
    "poor": {Op.BREAK: no_memory},
    "slow": {Op.BREAK: slow},
    "dumb": {Op.BREAK: nothing},
}


def main() -> None:
    path, seed, npages = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    lies = LIES[sys.argv[4]] if len(sys.argv) > 4 else {}
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(path)
    agent = FakeAgent(sock, some_pages(seed, npages), lies)
    agent.join()
    print("joined", flush=True)
    agent.serve()
    print("hung up", flush=True)
    time.sleep(30)


if __name__ == "__main__":
    main()
