"""Hostile users against root's daemon: what becomes of root's own merging, in time and in the daemon's memory.

    python -m benchmarks.hostile --seconds 3600 [--json FILE]

Two daemons of root's: the one has only root's processes, to the other all others do what comes to mind (`ATTACKS`).
Round by round two programs of root's with the same pages join the one, then two the other, and it is measured how long
each takes to merge them all. The hostile processes run all the time, so what they take of the machine's CPUs both
daemons suffer alike, and what is left between the two is what the daemon lets be done to itself.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import random
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.processes import end
from samepage import agent as library
from samepage.memory import AREA, PAGE_SIZE, RUN, RunKind, wire
from samepage.memory.wire import Op, Packet
from samepage.service.control import Client
from tests.fuzz.service import CONTENTS, Liar
from tests.service import fake_agent
from tests.service.fake_agent import BASE_VPN, NEVER, FakeAgent

USERS = range(61001, 61005)
MIB = 1 << 20
ARRAY = 64 * MIB
PR_SET_PDEATHSIG = 1

PROGRAM = """
import sys, time, numpy as np
a = np.random.default_rng(int(sys.argv[1])).integers(0, 1 << 62, int(sys.argv[2]) // 8, np.int64)
print(flush=True)
sys.stdin.read()
assert (a == np.random.default_rng(int(sys.argv[1])).integers(0, 1 << 62, int(sys.argv[2]) // 8, np.int64)).all()
"""


# -- attacks ------------------------------------------------------------------------------------------------


def connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(30)
    sock.connect(path)
    return sock


def serve(agent: FakeAgent, seconds: float = 30.0) -> None:
    agent.join()
    ends = time.monotonic() + seconds
    while time.monotonic() < ends and agent.serve_one():
        pass
    agent.sock.close()


def lies(path: str, rng: random.Random) -> None:
    """Well-formed answers, mostly, that are not true."""
    content = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (CONTENTS, PAGE_SIZE), np.uint8)
    pages = content[np.array(rng.choices(range(CONTENTS), k=96))]
    serve(Liar(connect(path), pages, (), rng, rng.choice((0.05, 0.3)), rng.choice((0, 0, 0.02))))


class Sparse(FakeAgent):
    """Claims 8 TiB, with a page here and there, and never the same twice."""

    def __init__(self, sock: socket.socket, rng: random.Random) -> None:
        super().__init__(sock, fake_agent.some_pages(1, 1))
        self.areas = np.array([(BASE_VPN, 1 << 31)], AREA)
        self.rng = rng

    def do_scan(self, request: Packet) -> tuple[bytes, int]:
        asked = request.reader().one(wire.SCAN)
        n = min(asked["budget"], 3000)
        runs = np.zeros(n, RUN)
        runs["vpn"] = max(asked["vpn"], BASE_VPN) + 512 * np.arange(n)
        runs["npages"], runs["kind"] = 1, RunKind.HASHED
        sums = np.random.default_rng(self.rng.getrandbits(32)).integers(0, 1 << 62, n, np.uint64)
        after = int(runs["vpn"][-1]) + 1 if n else 0
        after = 0 if after > BASE_VPN + (1 << 30) else after
        head = wire.pack(wire.SCANNED, after, 1, 1000, n, n, NEVER, 0)
        return head + runs.tobytes() + sums.tobytes(), -1


def sparse(path: str, rng: random.Random) -> None:
    """Claims of pages all over the place."""
    serve(Sparse(connect(path), rng))


class ManyAreas(FakeAgent):
    """Has a quarter of a million areas, and others each time it is asked."""

    seq = 1

    def do_areas(self, request: Packet) -> tuple[bytes, int]:
        if not int(request.reader().take("<u8", 1)[0]):
            self.seq += 1
            self.areas = np.empty((1 << 18) - 1, AREA)
            self.areas["vpn"], self.areas["npages"] = BASE_VPN + 3 * np.arange(len(self.areas)) + self.seq % 2, 1
        body, fd = super().do_areas(request)
        return self.seq.to_bytes(8, "little") + body[8:], fd

    def do_scan(self, request: Packet) -> tuple[bytes, int]:
        return wire.pack(wire.SCANNED, 0, self.seq + 1, 1000, 0, 0, NEVER, 0), -1


def many_areas(path: str, rng: random.Random) -> None:
    """A million areas, in four processes of a user."""
    serve(ManyAreas(connect(path), fake_agent.some_pages(1, 1)))


def slow(path: str, rng: random.Random) -> None:
    """Every answer just in time."""
    agent = FakeAgent(connect(path), fake_agent.some_pages(1, 64))
    agent.lies = {op: _late(rng.choice((0.09, 0.4, 2.0, 9.0))) for op in (Op.SCAN, Op.AREAS, Op.DONATE, Op.MERGE)}
    serve(agent, 60.0)


def _late(seconds: float) -> fake_agent.Lie:
    def answer(agent: FakeAgent, request: Packet) -> tuple[bytes, int]:
        time.sleep(seconds)
        agent.written[:] = True
        return agent.honest(request)

    return answer


class Crawling(FakeAgent):
    def do_scan(self, request: Packet) -> tuple[bytes, int]:
        at = max(request.reader().one(wire.SCAN)["vpn"], BASE_VPN)
        after = at + 1 if at < BASE_VPN + 100_000 else 0
        return wire.pack(wire.SCANNED, after, 1, 0, 0, 0, NEVER, 0), -1


def crawling(path: str, rng: random.Random) -> None:
    """Scans that advance by a page at a time, and merges that are asked for of such."""
    agent = Crawling(connect(path), fake_agent.some_pages(1, 1))
    agent.areas = np.array([(BASE_VPN, 1 << 20)], AREA)
    if os.fork() == 0:
        _end_with_the_parent()
        with contextlib.suppress(Exception):
            while True:
                with Client(path) as client:
                    client.ask("merge", vpn=0, npages=1 << 40, pid=os.getppid())
        os._exit(0)
    serve(agent)


def strange_descriptors(path: str, rng: random.Random) -> None:
    """Sockets that make wait whoever closes them."""
    agent = FakeAgent(connect(path), fake_agent.some_pages(1, 1))
    fd = _lingering()
    agent.join()
    nothing = wire.pack(wire.SCANNED, 0, 0, 0, 0, 0, NEVER, 0)
    socket.send_fds(agent.sock, [wire.encode(wire.Op.SCAN, 1, nothing)], [fd])
    os.close(fd)
    fd = _lingering()
    other = connect(path)
    socket.send_fds(other, [b'{"op": "stats"}'], [fd])
    os.close(fd)
    time.sleep(1)


def _lingering() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        sock = socket.create_connection(server.getsockname())
        taken, _ = server.accept()
    taken.detach()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 20))
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(b"x" * MIB)
    return sock.detach()


def connections(path: str, rng: random.Random) -> None:
    """As many as can be had, of which none says anything, or reads."""
    held = []
    for _ in range(400):
        held.append(connect(path))
        if rng.random() < 0.3:
            with contextlib.suppress(OSError):
                for _ in range(50):
                    held[-1].send(b'{"op": "files"}', socket.MSG_DONTWAIT)
    time.sleep(rng.random() * 3)


def questions(path: str, rng: random.Random) -> None:
    """Whatever everybody may ask, without a pause."""
    for _ in range(2000):
        with contextlib.suppress(OSError), Client(path) as client:
            for _ in range(20):
                client.ask(rng.choice(("stats", "status", "files", "processes", "get")))


def stopped(path: str, rng: random.Random) -> None:
    """An honest process that is stopped."""
    pid = os.fork()
    if pid == 0:
        _end_with_the_parent()
        with contextlib.suppress(Exception):
            serve(FakeAgent(connect(path), fake_agent.some_pages(rng.randrange(3), 256)))
        os._exit(0)
    time.sleep(rng.random() * 2)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(5)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def coming_and_going(path: str, rng: random.Random) -> None:
    """Joins, and is gone."""
    for _ in range(100):
        agent = FakeAgent(connect(path), fake_agent.some_pages(1, 64))
        agent.join()
        for _ in range(rng.randrange(4)):
            agent.serve_one()
        agent.sock.close()


ATTACKS: list[tuple[Callable[[str, random.Random], None], int]] = [
    (lies, 3),
    (sparse, 3),
    (many_areas, 4),
    (slow, 4),
    (crawling, 2),
    (strange_descriptors, 2),
    (connections, 1),
    (questions, 2),
    (stopped, 6),
    (coming_and_going, 1),
]
"""What is done, and by how many processes at a time."""


def attack(what: Callable[[str, random.Random], None], path: str, uid: int, seed: int, nice: int) -> int:
    """Starts a process that does it again and again; its pid, which is that of its process group."""
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    _end_with_the_parent()
    os.nice(nice)
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    rng = random.Random(seed)
    while True:
        pid = os.fork()  # a process of its own each time: what it is known for does not matter to it
        if pid == 0:
            _end_with_the_parent()
            with contextlib.suppress(Exception):
                what(path, rng)
            os._exit(0)
        os.waitpid(pid, 0)
        rng.random()
        time.sleep(0.05)


def _end_with_the_parent() -> None:
    """Whatever becomes of this benchmark, nothing hostile outlives it. (A change of user would undo it.)"""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


# -- measures -----------------------------------------------------------------------------------------------


class Daemon:
    """`samepage daemon`, and programs of root's that join it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = str(folder / name)
        self.said = folder / f"{name}.said"
        with self.said.open("w") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "samepage", "daemon", "--socket", self.path], stderr=said, stdout=said
            )
        while not Path(self.path).exists():
            time.sleep(0.02)

    def resident(self) -> tuple[int, int]:
        """Bytes now, and at most."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        found = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith("Vm")}
        return found["VmRSS"], found["VmHWM"]

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def merge(self, seed: int, patience: float) -> float:
        """Seconds until two programs that have built the same array share it; `patience` if they do not by then."""
        environment = os.environ | {"LD_PRELOAD": str(library.library_path()), "SAMEPAGE_SOCKET": self.path}
        command = [sys.executable, "-c", PROGRAM, str(seed), str(ARRAY)]
        programs = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) for _ in range(2)
        ]
        try:
            for program in programs:
                assert program.stdout is not None
                program.stdout.readline()
            began = time.monotonic()
            while (took := time.monotonic() - began) < patience and not self._merged([p.pid for p in programs]):
                time.sleep(0.02)
            return min(took, patience)
        finally:
            for program in programs:
                program.communicate()
                assert program.returncode == 0, "its memory is not what it was"

    def _merged(self, pids: list[int]) -> bool:
        try:
            with Client(self.path) as client:
                rows = {row["pid"]: row["merged"] for row in client.ask("status", brief=True).get("processes", [])}
        except OSError:
            return False
        return all(rows.get(pid, 0) >= 0.95 * ARRAY // PAGE_SIZE for pid in pids)

    def end(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            end(self.process, 20)


def run(
    seconds: float, seed: int, nice: int = 19, only: str = "", say: Callable[[str], None] = print
) -> dict[str, Any]:
    """For so long. `only`: one attack."""
    with tempfile.TemporaryDirectory(prefix="samepage-") as name:
        folder = Path(name)
        os.chmod(folder, 0o755)
        quiet, attacked = Daemon(folder, "quiet"), Daemon(folder, "attacked")
        groups: list[int] = []
        rounds: list[tuple[float, float]] = []
        try:
            alone = sorted(attacked.merge(seed + n, 60.0) for n in range(3))[1]
            say(f"before: {alone:.2f} s, {attacked.resident()[0] / MIB:.0f} MiB")
            for what, count in ATTACKS:
                for n in range(count if only in ("", what.__name__) else 0):
                    uid = USERS[len(groups) % len(USERS)] if what is not many_areas else USERS[0]
                    groups.append(attack(what, attacked.path, uid, seed + 1000 + len(groups) + n, nice))
            ends = time.monotonic() + seconds
            while time.monotonic() < ends or not rounds:
                n = seed + 10 + len(rounds)
                rounds.append((quiet.merge(n, 60.0), attacked.merge(n, 60.0)))
                now, most = attacked.resident()
                say(
                    f"{seconds - (ends - time.monotonic()):6.0f} s: {rounds[-1][0]:.2f} s undisturbed, "
                    f"{rounds[-1][1]:.2f} s attacked; {now / MIB:.0f} MiB, {most / MIB:.0f} at most, "
                    f"{attacked.descriptors()} descriptors"
                )
                assert attacked.process.poll() is None, attacked.said.read_text()
            quiet_most, attacked_most = quiet.resident()[1], attacked.resident()[1]
        finally:
            _end_attacks(groups)
            said = attacked.said.read_text()
            for daemon in (quiet, attacked):
                daemon.end()
    ours, theirs = np.array(rounds).T
    return {
        "seconds": seconds,
        "seed": seed,
        "rounds": len(rounds),
        "alone": alone,
        "undisturbed": {"median": float(np.median(ours)), "p95": float(np.quantile(ours, 0.95)), "most": max(ours)},
        "attacked": {"median": float(np.median(theirs)), "p95": float(np.quantile(theirs, 0.95)), "most": max(theirs)},
        "times_as_long": {"median": float(np.median(theirs / ours)), "in_all": float(theirs.sum() / ours.sum())},
        "resident_most": {"undisturbed": quiet_most, "attacked": attacked_most},
        "tracebacks": said.count("Traceback"),
        "said": said.splitlines()[-20:],
    }


def _end_attacks(groups: list[int]) -> None:
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    for group in groups:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(group, 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="one attack: " + ", ".join(what.__name__ for what, _ in ATTACKS))
    parser.add_argument(
        "--nice", type=int, default=19, help="of the hostile processes, so that they leave the CPUs to the daemons"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if os.getuid():
        parser.error("only root can be other users")
    found = run(args.seconds, args.seed, args.nice, args.only, lambda line: print(line, flush=True))
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
