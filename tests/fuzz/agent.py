"""A service that lies to agents, over the wire, in every way a seed can think of, while the process they are in checks
its memory: not a byte changes, nothing ends, hangs, or is left open.

The process is the model's (`model.py`), two threads that go on changing their memory, its agent built with its books
checked. It is sent requests with ranges of its areas, of all else that it has mapped (stacks, libraries, the windows of
the agent), and of nothing; segments of pages that it has and of such that it has not, unsealed, short, and descriptors
of anything else; packets cut short, with another length than they say, with several descriptors, in the wrong order,
without end and without reading what is answered; and connections that end in the middle.

`python -m tests.fuzz.agent --seconds N` goes on from a random seed for so long, and ends with 1 and the seed of the
first process that something happened to. `--seed` runs one again, though what its threads do meanwhile may differ.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import fcntl
import os
import random
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from samepage.memory import AREA, EXTENT, PAGE_SIZE, ZERO_PAGE, wire
from samepage.memory.wire import Op
from tests.fuzz import model

PATTERNS = 24
ARENA = 0x7E9000000000 // PAGE_SIZE
PATIENCE = 60.0
"""Seconds for one answer."""

SEALS = 0xF  # seal, shrink, grow, write
ODD = (0, 1, 2, 511, 512, 513, 1 << 20, 1 << 35, (1 << 36) - 1, 1 << 36, 1 << 47, 1 << 52, 1 << 63, (1 << 64) - 1)


def _patterns() -> bytes:
    """The model's pages, as shadow.c makes them; the first is of zeros."""
    k = np.arange(PAGE_SIZE // 8, dtype=np.uint64)
    with np.errstate(over="ignore"):
        x = np.arange(PATTERNS + 1, dtype=np.uint64)[:, None] * np.uint64(1000003) + k
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    x[0] = 0
    return x.tobytes()


PAGES = _patterns()


class Liar:
    """What one connection is asked. `pid` is the process's, which is looked at from outside."""

    def __init__(self, sock: socket.socket, pid: int, rng: random.Random, tally: Counter[str]) -> None:
        self._sock = sock
        self._pid = pid
        self._rng = rng
        self._tally = tally
        self._seq = 0
        self._segments: list[int] = []
        self._statuses = b""
        self._areas = np.empty(0, AREA)  # as it last said
        self._wild = False  # may ask for what there cannot be, which ends the conversation

    def talk(self) -> None:
        """Until the process hangs up, or there is enough of it. `TimeoutError`: it does not answer."""
        self._sock.settimeout(PATIENCE)
        hello = wire.recv(self._sock)
        if not self._welcome(hello.seq):
            return
        wire.recv(self._sock).close()
        with contextlib.suppress(wire.Disconnected, wire.WireError, BrokenPipeError, ConnectionResetError):
            for _ in range(self._rng.randrange(1, 400)):
                self._tally["requests"] += 1
                if self._rng.random() < 0.02:
                    self._nonsense()
                else:
                    self._request()

    def close(self) -> None:
        for fd in self._segments:
            os.close(fd)
        self._sock.close()

    def _welcome(self, seq: int) -> bool:
        """False: what was said makes the process hang up."""
        rng = self._rng
        flags = rng.choice((0, 0, 0, 2, 4, 6, 1, 8, 16, rng.getrandbits(32)))
        reserve = rng.choice((0, 0, 16 << 20, rng.choice(ODD)))
        section = rng.choice((64, 16, 1, 512, 0, 513, 1 << 31))
        body = wire.pack(wire.WELCOME, wire.VERSION, flags, reserve, section, rng.getrandbits(1))
        lie = rng.random()
        if lie < 0.03:
            body = body[: rng.randrange(len(body))]
        fd = self._stranger() if rng.random() < 0.1 else -1
        try:
            wire.send(self._sock, Op.WELCOME if lie < 0.97 else rng.randrange(20), seq, body, fd=fd)
        finally:
            if fd >= 0:
                os.close(fd)
        return 0.03 <= lie < 0.97

    def _request(self) -> None:
        rng = self._rng
        self._wild = rng.random() < 0.02
        if rng.random() < 0.2:
            self._merge_honestly()
            return
        ops = (Op.AREAS, Op.SCAN, Op.DONATE, Op.DONATE, Op.MERGE, Op.MERGE, Op.MERGE, Op.BREAK, Op.RESTORE, Op.PROVE)
        op = rng.choice(ops)
        if rng.random() < 0.05:
            op = rng.choice((Op.MAP_COUNT, Op.HEADROOM))
        body, fd, own = self._body(op)
        try:
            if rng.random() < 0.01:  # where none belongs, or another one
                fd, own = self._stranger(), True
            if rng.random() < 0.03:
                self._flood(op, body, fd)
            else:
                self._ask(op, body, fd)
        finally:
            if own and fd >= 0:
                os.close(fd)

    def _merge_honestly(self) -> None:
        """So that the next lie meets merged pages."""
        vpn, npages = self._vpn(), self._rng.randrange(1, 64)
        had = len(self._segments)
        self._ask(Op.DONATE, wire.pack(AREA, vpn, npages), -1)
        done = [i for i, status in enumerate(self._statuses) if status == 0]
        if done and len(self._segments) >= had:
            extents = np.array([(vpn + i, 1, k) for k, i in enumerate(done)], EXTENT)
            self._ask(Op.MERGE, extents.tobytes(), self._segments[-1])

    def _body(self, op: Op) -> tuple[bytes, int, bool]:
        """What is asked, the descriptor on it, and whether that is to be closed."""
        rng = self._rng
        if op is Op.AREAS:
            return np.uint64(self._vpn()).tobytes(), -1, False
        if op is Op.SCAN:
            vpn = rng.choice((0, self._vpn()))
            return wire.pack(wire.SCAN, vpn, rng.choice((1, 512, 1 << 20, *ODD)), rng.choice((1 << 52, self._vpn())),
                             rng.choice((0, 1, 5, rng.getrandbits(32))), 0), -1, False  # fmt: skip
        if op is Op.BREAK:
            return wire.pack(AREA, self._vpn(), self._npages()), -1, False
        if op in (Op.DONATE, Op.RESTORE):
            return (
                np.array([(self._vpn(), self._npages()) for _ in range(rng.randint(1, 24))], AREA).tobytes(),
                -1,
                False,
            )
        if op is Op.PROVE:
            count = rng.choice((0, 1, 4, 256, rng.randrange(8000)))
            return rng.randbytes(rng.choice((32, 32, 31))) + np.array([self._vpn()] * count, "<u8").tobytes(), -1, False
        if op is not Op.MERGE:
            return b"", -1, False
        kind = rng.random()
        if kind < 0.25 and self._segments:  # of its own pages, wherever they are now
            return self._extents(), rng.choice(self._segments), False
        if kind < 0.8:
            first = rng.randrange(PATTERNS)
            pages = PAGES[first * PAGE_SIZE :] + PAGES if rng.random() < 0.9 else rng.randbytes(64 * PAGE_SIZE)
            return self._extents(), self._memfd(pages), True
        return self._extents(), self._stranger(), True

    def _vpn(self) -> int:
        """A page of an area, or of the arena, most often; one of anything that is mapped; or of nothing."""
        rng, kind = self._rng, self._rng.random()
        if kind < 0.5 and len(self._areas):
            area = self._areas[rng.randrange(len(self._areas))]
            return int(area["vpn"]) + rng.randrange(int(area["npages"]))
        if kind < 0.8:
            return ARENA + rng.randrange(2 * (1024 + 16))
        if kind < 0.97 or not self._wild:
            with contextlib.suppress(OSError, IndexError):
                line = rng.choice(Path(f"/proc/{self._pid}/maps").read_text().splitlines())
                start, end = (int(word, 16) // PAGE_SIZE for word in line.split()[0].split("-"))
                return min(rng.randrange(start, end), (1 << 36) - 1024)
        return rng.choice(ODD) if self._wild else 0

    def _npages(self) -> int:
        return self._rng.choice((1, 1, 2, 3, self._rng.randrange(1, 64), self._rng.randrange(1, 1024)))

    def _extents(self) -> bytes:
        rng, extents = self._rng, []
        if self._wild and rng.random() < 0.5:
            return np.array([(rng.choice(ODD), rng.choice(ODD), rng.choice(ODD))], EXTENT).tobytes()
        for _ in range(rng.randint(1, rng.choice((1, 4, 40)))):
            n = min(self._npages(), 40)
            offset = rng.choice((0, rng.randrange(PATTERNS), rng.randrange(PATTERNS), ZERO_PAGE))
            extents.append((self._vpn(), n, offset))
        if rng.random() < 0.5:
            extents.sort()
        return np.array(extents, EXTENT).tobytes()

    def _memfd(self, pages: bytes) -> int:
        """A segment; or not quite."""
        rng = self._rng
        fd = os.memfd_create("samepage", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.truncate(fd, len(pages) + rng.choice((0, 0, 0, 1, -1, -PAGE_SIZE * 3)))
        os.pwrite(fd, pages[: os.fstat(fd).st_size], 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, rng.choice((SEALS, SEALS, SEALS, SEALS & ~1, 0x8, 0x2, 0x10, 0)))
        return fd

    def _stranger(self) -> int:
        """A descriptor that is no segment's."""
        kind = self._rng.randrange(8)
        if kind == 0:
            return os.open("/dev/zero", os.O_RDWR)
        if kind == 1:
            return os.open("/", os.O_RDONLY)
        if kind == 2:
            return os.open("/proc/self/mem", os.O_RDWR)
        if kind == 3:
            return os.eventfd(0)
        if kind == 4:
            return socket.socket(socket.AF_UNIX).detach()
        if kind == 5:
            return os.memfd_create("empty", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        if kind == 6:
            return os.open(sys.executable, os.O_RDONLY)
        ends = os.pipe()
        os.close(ends[1])
        return ends[0]

    def _ask(self, op: Op, body: bytes, fd: int) -> None:
        self._seq += 1
        wire.send(self._sock, op, self._seq, body, fd=fd)
        self._take(op, self._seq)

    def _take(self, op: int, seq: int) -> None:
        answer = wire.recv(self._sock)
        if (answer.op, answer.seq) != (op, seq):
            raise AssertionError(f"asked op {op} #{seq}, answered op {answer.op} #{answer.seq}")
        self._tally[f"{Op(op).name} {'refused' if answer.error else 'done'}"] += 1
        if op == Op.MERGE and not answer.error:
            self._tally["merged"] += bytes(answer.body[16:]).count(0)
        self._statuses = bytes(answer.body[16:])
        if op == Op.AREAS and len(self._statuses) > 16:
            self._areas = np.frombuffer(answer.body, AREA, offset=wire.AREAS.itemsize)
        if answer.fd >= 0:
            self._segments.append(answer.take_fd())
        if len(self._segments) > 8:
            os.close(self._segments.pop(0))

    def _flood(self, op: Op, body: bytes, fd: int) -> None:
        """Many at once, read late or never."""
        first, sent = self._seq + 1, 0
        self._sock.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            for _ in range(self._rng.randrange(2, 200)):
                wire.send(self._sock, op, self._seq + 1, body, fd=fd)
                self._seq += 1
                sent += 1
        self._sock.settimeout(PATIENCE)
        self._tally["floods"] += 1
        if self._rng.random() < 0.3:
            raise wire.Disconnected
        for seq in range(first, first + sent):
            self._take(op, seq)

    def _nonsense(self) -> None:
        """What is no packet, or none of a service's; most ends the conversation."""
        rng = self._rng
        data = wire.encode(
            rng.choice((*Op, rng.getrandbits(32))), 1, rng.randbytes(rng.choice((0, 8, 16, 24, 40, 4000)))
        )
        kind = rng.randrange(6)
        if kind == 0:
            data = data[: rng.randrange(len(data))]
        elif kind == 1:
            data += b"x"
        elif kind == 2:
            data = rng.randbytes(rng.choice((1, 15, 16, 17, wire.MSG_MAX, wire.MSG_MAX + 1, 180_000)))
        if kind == 3:
            strangers = [self._stranger() for _ in range(rng.choice((2, 3, 100)))]
            try:
                self._sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", strangers))])
            finally:
                for fd in strangers:
                    os.close(fd)
        else:
            self._sock.send(data)
        self._tally["nonsense"] += 1
        if rng.random() < 0.5:
            raise wire.Disconnected
        wire.recv(self._sock).close()


def _agent_descriptors(pid: int) -> int:
    """How many the agent's thread has open, in its own file table."""
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            if (task / "comm").read_text() == "samepage\n":
                return len(os.listdir(task / "fd"))
    return 0


@contextlib.contextmanager
def _subject(program: Path, agent: Path, path: str, seed: int, seconds: float) -> Iterator[subprocess.Popen[str]]:
    command = [str(program), "--mode", "calm", "--seed", str(seed), "--steps", "100000000", "--lenient", "--naps"]
    command += ["--seconds", str(int(seconds))]
    env = os.environ | {"LD_PRELOAD": str(agent), "SAMEPAGE_SOCKET": path, "SAMEPAGE_MIN_ALLOC": "65536"}
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            model.kill(process)


def run_case(program: Path, agent: Path, folder: Path, seed: int, seconds: float, tally: Counter[str]) -> str:
    """Lies to one process for so long; what was found, or ""."""
    rng = random.Random(seed)
    path = folder / "liar"
    path.unlink(missing_ok=True)
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
        _subject(program, agent, str(path), seed, seconds) as process,
    ):
        listener.bind(str(path))
        listener.listen(64)
        found, open_most = _lie(listener, process, rng, tally)
        try:
            said, _ = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            return f"it hangs:\n{model.stacks(process.pid)}"
        if process.returncode:
            return f"status {process.returncode}\n{said}"
        if open_most > 24:
            return f"{open_most} descriptors are open in the agent's thread"
        return found


def _lie(
    listener: socket.socket, process: subprocess.Popen[str], rng: random.Random, tally: Counter[str]
) -> tuple[str, int]:
    """Until the process ends. What was found, and the most descriptors that its agent had open."""
    open_most = 0
    while process.poll() is None:
        if not select.select([listener], [], [], 0.1)[0]:
            continue
        sock, _ = listener.accept()
        tally["connections"] += 1
        pid = int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], "little")
        liar = Liar(sock, pid, rng, tally)
        try:
            liar.talk()
        except TimeoutError:
            return f"process {pid} does not answer:\n{model.stacks(pid)}", open_most
        except (wire.WireError, OSError):
            pass
        finally:
            liar.close()
        open_most = max(open_most, _agent_descriptors(process.pid))
    return "", open_most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, help="this one case")
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(1 << 31)
    tally: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="samepage-fuzz-") as name:
        program, agent = model.build(Path(name))
        ends = time.monotonic() + args.seconds
        while True:
            found = run_case(program, agent, Path(name), seed, min(60.0, max(3.0, ends - time.monotonic())), tally)
            if found:
                print(f"agent: python -m tests.fuzz.agent --seed {seed}\n{found}", file=sys.stderr)
            if found or args.seed is not None or time.monotonic() >= ends:
                break
            seed += 1
    print(f"agent: {dict(sorted(tally.items()))}, {'a finding' if found else 'and nothing found'}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
