"""Agents that lie to ksmd, over the wire, in every way a seed can think of: whatever they answer, the books of their
domain agree after every step, and honest processes of the same user are merged on.

`python -m tests.fuzz.service --seconds N` goes on from a random seed for so long, and ends with 1 and the seed of the
first case that failed. `--seed` runs one again. All happens in one thread, so a seed is a case.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import os
import random
import resource
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.processes import wait_until
from samepage.ksmd import Ksmd, books
from samepage.ksmd.domain import Domain
from samepage.ksmd.index import ChecksumIndex, _Sorted
from samepage.ksmd.mm_slot import MmSlot
from samepage.ksmd.pieces import Pieces
from samepage.ksmd.rmap import RmapItems
from samepage.ksmd.stable import StableTree
from samepage.memory import AREA, EXTENT, PAGE_SIZE, RUN, STALLS_US, PageStatus, RunKind, wire
from samepage.memory.agent import AgentAddressSpace
from samepage.memory.proof import expected
from samepage.memory.wire import Op, Packet
from samepage.process.merge_domain import MergeDomain
from tests.service.fake_agent import BASE_VPN, NEVER, FakeAgent, sealed

NPAGES = 96
CONTENTS = 40
"""Different pages there are, so that there is much to merge."""

MEMORY_MAX = 128 << 20
"""Bytes by which a case may make the service grow."""

PASSES = 12
STEPS = 40

HUGE = (0, 1, 1 << 28, 1 << 30, 1 << 31, (1 << 32) - 1, 1 << 52, (1 << 52) - 1, 1 << 63, (1 << 64) - 1)


class Pump:
    """The service's end of a connection whose other end answers at once, in the same thread."""

    def __init__(self, sock: socket.socket, agent: FakeAgent) -> None:
        self._sock = sock
        self._agent = agent

    def send(self, data: bytes, flags: int = 0) -> int:
        sent = self._sock.send(data, flags)
        self._agent.serve_one()
        return sent

    def sendmsg(self, *arguments: Any) -> int:
        sent = self._sock.sendmsg(*arguments)
        self._agent.serve_one()
        return sent

    def settimeout(self, seconds: float) -> None:
        self._sock.settimeout(0.001)  # all answers are here already

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


class Liar(FakeAgent):
    """Answers mostly in the right form, and now and then not even that. Claims that its pages are `names`."""

    def __init__(
        self, sock: socket.socket, pages: Any, names: Any, rng: random.Random, chance: float, garbled: float
    ) -> None:
        super().__init__(sock, pages)
        self._names = {
            page.tobytes(): super(Liar, self).checksum(name) for page, name in zip(pages, names, strict=False)
        }
        self._known = {page.tobytes() for page in pages}
        self.stolen = 0
        self._rng = rng
        self._aside = random.Random(rng.getstate()[1][0])  # of its own, so that old seeds still find what they found
        self._chance = chance
        self._garbled = garbled
        self._boasts = rng.choice((0.03, 0.03, 0.3))
        self._inodes = [1, 2, 3]
        self._seq = 1

    def checksum(self, page: Any) -> int:
        return self._names.get(page.tobytes()) or super().checksum(page)

    def honest(self, request: Packet) -> tuple[bytes, int]:
        rng, op = self._rng, Op(request.op)
        if request.fd >= 0:
            self._inodes.append(os.fstat(request.fd).st_ino)
            content = os.pread(request.fd, 1 << 30, 0)
            held = {content[at : at + PAGE_SIZE] for at in range(0, len(content), PAGE_SIZE)}
            self.stolen += held.isdisjoint(self._known)
        if rng.random() < self._chance:
            body, fd = getattr(self, f"lie_{op.name.lower()}")(request)
        else:
            body, fd = getattr(self, f"do_{op.name.lower()}")(request)
            if op == Op.SCAN:  # it knows of the list it gave last
                body = body[:8] + self._seq.to_bytes(8, "little") + body[16:]
            if op == Op.AREAS:
                body = self._seq.to_bytes(8, "little") + body[8:]
        if rng.random() < self._garbled:
            body = self._garble(body)
        header = [int(op), request.seq, 0, len(body)]
        if rng.random() < self._garbled:
            header[rng.randrange(4)] = rng.choice(HUGE) & 0x7FFFFFFF
        return wire.pack(wire.HDR, *header) + body, fd

    def _garble(self, body: bytes) -> bytes:
        rng, data = self._rng, bytearray(body)
        for _ in range(rng.randint(1, 3)):
            if data and rng.random() < 0.8:
                at = rng.randrange(len(data))
                size = rng.choice((1, 2, 4, 8))
                data[at : at + size] = (rng.choice(HUGE) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
            else:
                data = data[: rng.randint(0, len(data))] + bytes(rng.randint(0, 40))
        return bytes(data)

    def _vpn(self) -> int:
        rng = self._rng
        return rng.choice(HUGE) if rng.random() < 0.03 else BASE_VPN + rng.randint(-2, NPAGES + 2)

    def _count(self) -> int:
        rng = self._rng
        return rng.choice(HUGE) if rng.random() < self._boasts else rng.choice((1, 1, 2, 3, 10, 50))

    def _ranges(self, dtype: Any, most: int) -> Any:
        """Mostly ascending, mostly disjoint."""
        rng, rows, at = self._rng, [], BASE_VPN
        for _ in range(rng.randint(0, most)):
            at += rng.choice((0, 0, 1, 3, 20))
            n = self._count()
            rows.append((at if rng.random() < 0.97 else self._vpn(), n))
            at += n
        out = np.zeros(len(rows), dtype)
        for i, (vpn, n) in enumerate(rows):
            out[i]["vpn"] = vpn & ((1 << 64) - 1)
            out[i]["npages"] = n & ((1 << 8 * out[i]["npages"].itemsize) - 1)
        return out

    def lie_areas(self, request: Packet) -> tuple[bytes, int]:
        rng = self._rng
        self._seq += rng.randint(0, 1)
        self.areas = self._ranges(AREA, 8)
        more = 0 if rng.random() < 0.8 else self._vpn() & ((1 << 64) - 1)
        return wire.pack(wire.AREAS, self._seq, more, rng.randint(0, 1), 0) + self.areas.tobytes(), -1

    def lie_scan(self, request: Packet) -> tuple[bytes, int]:
        rng = self._rng
        runs = self._ranges(RUN, 12)
        for run in runs:
            run["kind"] = rng.choice(list(RunKind)) if rng.random() < 0.99 else 77
            run["ino"] = rng.choice(self._inodes)
            run["offset"] = rng.choice(HUGE) if rng.random() < 0.03 else rng.randint(0, 60)
            honest = rng.random() >= self._boasts
            run["npages"] = min(int(run["npages"]), 4000) if honest else run["npages"]
        hashed = int(runs["npages"][runs["kind"] == RunKind.HASHED].sum(dtype=np.uint64))
        hashed = min(hashed, 8000) if rng.random() < 0.97 else rng.randint(0, 100)
        sums = np.array([self.checksum(self.pages[rng.randrange(NPAGES)]) for _ in range(hashed)], "<u8")
        seq = self._seq if rng.random() < 0.7 else self._seq + rng.randint(-1, 1)
        more = 0 if rng.random() < 0.7 else self._vpn() & ((1 << 64) - 1)
        head = (more, max(seq, 0), rng.choice(HUGE), len(runs), hashed, rng.choice((NEVER, 0)), 0, self._stalls())
        return wire.pack(wire.SCANNED, *head) + runs.tobytes() + sums.tobytes(), -1

    def _stalls(self) -> bytes:
        rng = self._aside
        counts = [rng.choice((0, 0, 1, 5, 0xFFFFFFFF)) for _ in range(len(STALLS_US) + 1)]
        most = sum(n * us * 1000 for n, us in zip(counts, (*STALLS_US, STALLS_US[-1]), strict=True))
        ns = most if rng.random() < 0.8 else rng.choice(HUGE)
        return np.array((ns & ((1 << 64) - 1), counts), wire.STALLS).tobytes() if rng.random() < 0.5 else b""

    def _statuses(self, npages: int) -> Any:
        rng = self._rng
        if rng.random() < 0.3:
            return np.full(npages, rng.choice(list(PageStatus)), np.uint8)
        status = np.array(rng.choices([0] * 6 + list(PageStatus), k=npages), np.uint8)
        if npages and rng.random() < 0.03:
            status[rng.randrange(npages)] = rng.randint(7, 255)
        return status

    def lie_donate(self, request: Packet) -> tuple[bytes, int]:
        rng = self._rng
        npages = int(request.reader().rest(AREA)["npages"].sum())
        status = self._statuses(npages)
        done = int(np.count_nonzero(status == PageStatus.DONE))
        held = done if rng.random() < 0.9 else rng.randint(0, done + 3)
        pages = self.pages[np.array(rng.choices(range(NPAGES), k=held), np.int64)]
        fd = sealed(pages.tobytes()) if (held if rng.random() < 0.97 else 1 - bool(held)) else -1
        if fd >= 0:
            self._inodes.append(os.fstat(fd).st_ino)
        return wire.pack(wire.DONE, rng.choice(HUGE), npages) + status.tobytes(), fd

    def lie_prove(self, request: Packet) -> tuple[bytes, int]:
        """That a page is another one that it has, or anything."""
        rng, reader = self._rng, request.reader()
        key, count = reader.one(wire.PROVE)["key"], len(reader.body) // 8 - 4
        proofs = [expected(key, rng.choice(self.pages).tobytes()) if rng.random() < 0.5 else rng.randbytes(16)
                  for _ in range(count)]  # fmt: skip
        body = wire.pack(wire.DONE, rng.choice(HUGE), count) + self._statuses(count).tobytes()
        return body + b"".join(proofs), -1

    def lie_merge(self, request: Packet) -> tuple[bytes, int]:
        extents = request.reader().rest(EXTENT)
        npages = int(extents["npages"].sum())
        return wire.pack(wire.DONE, self._rng.choice(HUGE), npages) + self._statuses(npages).tobytes(), -1

    def lie_break(self, request: Packet) -> tuple[bytes, int]:
        rng = self._rng
        npages = request.reader().one(AREA)["npages"]
        counts = [rng.choice((0, 1, npages // 2, npages, rng.choice(HUGE))) for _ in range(2)]
        error = rng.choice((0, errno.ENOMEM, errno.EINTR, errno.EFAULT, errno.EFAULT, errno.EIO))
        return wire.pack(wire.BROKEN, *counts, rng.choice(HUGE), rng.choice(HUGE), 0, error, 0), -1

    def lie_restore(self, request: Packet) -> tuple[bytes, int]:
        return wire.pack(wire.RESTORED, *(self._count() & ((1 << 64) - 1) for _ in range(3))), -1

    def lie_map_count(self, request: Packet) -> tuple[bytes, int]:
        return wire.pack(wire.MAP_COUNT, self._rng.choice(HUGE), self._rng.choice((*HUGE, 5, 10))), -1

    def lie_headroom(self, request: Packet) -> tuple[bytes, int]:
        return wire.pack(wire.HEADROOM, self._rng.choice(HUGE)), -1


class Space(AgentAddressSpace):
    """Of a process that has no more pages than these."""

    def pages_max(self) -> int:
        return NPAGES


class Mistake(Exception):
    """What a mistake of ksmd's own, or no memory for an array, would raise."""


CHANGING = {
    Domain: (
        "set_state",
        "withdraw",
        "changed",
        "forget",
        "cut",
        "by_slot",
        "owners",
        "end_pass",
        "_hold",
    ),
    StableTree: ("add", "attach", "detach", "publish", "unpublish", "close", "found", "_recount"),
    ChecksumIndex: ("insert", "remove", "find"),
    _Sorted: ("lower_bound",),
    RmapItems: ("allocate", "allocate_each", "free"),
    Pieces: ("add", "remove", "missing", "locate"),
    MmSlot: ("looked_at",),
}


@contextlib.contextmanager
def mistakes(rng: random.Random, chance: float) -> Iterator[Callable[[bool], None]]:
    """Meanwhile what changes the books fails now and then, before or after it did. What comes says when not to."""
    active = True

    def fails(work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work)
        def attempt(*args: Any, **kwargs: Any) -> Any:
            if active and rng.random() < chance:
                raise Mistake(work.__qualname__)
            result = work(*args, **kwargs)
            if active and rng.random() < chance:
                raise Mistake(work.__qualname__)
            return result

        return attempt

    def switch(on: bool) -> None:
        nonlocal active
        active = on

    real = [(owner, name, getattr(owner, name)) for owner, names in CHANGING.items() for name in names if chance]
    for owner, name, work in real:
        setattr(owner, name, fails(work))
    try:
        yield switch
    finally:
        for owner, name, work in real:
            setattr(owner, name, work)


class Case:
    """One seed: some honest processes, some liars, and what is asked of ksmd in between."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._now = 0.0
        self._ksmd = Ksmd(clock=self._clock, cpu_clock=lambda: 0.0)
        self._spaces: dict[MmSlot, AgentAddressSpace] = {}
        self._content = np.random.default_rng(seed).integers(0, 256, (3 * NPAGES, PAGE_SIZE), np.uint8)
        self._content[0] = 0
        self._sharing = self._rng.choice((2, 3, 5, 4096))
        self._pid = 1000
        self._garbled = self._rng.choice((0, 0, 0.02))
        self._mistakes = self._rng.choice((0, 0, 0.002, 0.02))

    def _clock(self) -> float:
        self._now += 0.01
        return self._now

    def _join(self, chance: float, which: Sequence[int] = ()) -> MmSlot:
        """A process with those pages, or some: chance 0 for an honest one."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for sock in (ours, theirs):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        rng, self._pid = self._rng, self._pid + 1
        agent: FakeAgent
        pages = self._content[np.array(which or rng.choices(range(CONTENTS), k=NPAGES))].copy()
        if not chance:
            agent = FakeAgent(theirs, pages)
        elif rng.random() < 0.7:
            agent = Liar(theirs, pages, (), rng, chance, self._garbled)
        else:
            agent = Liar(theirs, self._content[2 * NPAGES :], pages, rng, chance, self._garbled)
        zero = agent.checksum(self._content[0])
        ready = {"swap": 1, "tracking": 1, "zero_checksum": zero if rng.random() < 0.9 else 7, "unnamed": 0}
        space = Space(Pump(ours, agent), self._pid, MergeDomain(0), "fuzz", ready)  # type: ignore[arg-type]
        slot = self._ksmd.enter(space)
        self._spaces[slot] = space
        return slot

    def _leave(self, slot: MmSlot) -> None:
        space = self._spaces.pop(slot)
        space.hang_up("it ended")
        self._ksmd.exit(slot)
        space.close()
        space._sock._agent.sock.close()  # type: ignore[attr-defined]

    def _check(self) -> None:
        """Mends nothing and makes no mistakes."""
        for domain in self._ksmd.mm_list.domains():
            found = books.problems(domain)
            assert not found, found
        agents = [space._sock._agent for space in self._spaces.values()]  # type: ignore[attr-defined]
        assert not sum(getattr(agent, "stolen", 0) for agent in agents), "a segment for who has nothing of it"
        for slot in [slot for slot in self._spaces if slot.gone]:
            self._leave(slot)

    def _step(self) -> None:
        rng, ksmd = self._rng, self._ksmd
        slots = list(self._spaces)
        what = rng.random()
        if what < 0.55 or not slots:
            ksmd.do_scan(rng.choice((1, 50, 100_000)))
        elif what < 0.65:
            ksmd.merge_range(rng.choice(slots), BASE_VPN + rng.randint(-5, NPAGES), rng.randint(1, NPAGES))
        elif what < 0.75:
            ksmd.unmerge(rng.choice([None, *slots]), BASE_VPN + rng.randint(-5, NPAGES), rng.randint(1, 3 * NPAGES))
        elif what < 0.80:
            ksmd.set("run", rng.choice((0, 1, 1, 2)))
        elif what < 0.85:
            ksmd.set("max_overcommit", rng.choice((0, 1, 100)))
        elif what < 0.87:
            ksmd.set("use_zero_pages", rng.randint(0, 1))
        elif what < 0.90:
            ksmd.recount_zeros(rng.choice(slots))
        elif what < 0.93:
            ksmd.set("stable_node_chains_prune_millisecs", 0)
        elif what < 0.96:
            self._leave(rng.choice(slots))
        elif len(slots) < 8:
            self._join(rng.choice((0.1, 0.3, 0.7)))

    def run(self) -> None:
        rng, ksmd = self._rng, self._ksmd
        ksmd.set("max_page_sharing", self._sharing)
        for chance in rng.choices((0.0, 0.05, 0.2, 0.6), k=rng.randint(2, 6)):
            self._join(chance)
        with mistakes(rng, self._mistakes) as make_mistakes:
            for _ in range(STEPS):
                with contextlib.suppress(OSError, Mistake):  # what is refused, or whose process went: no news
                    make_mistakes(True)
                    self._step()
                make_mistakes(False)
                self._check()
        self._others_are_merged_on()

    def _others_are_merged_on(self) -> None:
        with contextlib.suppress(OSError):
            self._ksmd.set("run", 0)
        for knob, value in (("run", 1), ("max_overcommit", 0)):
            self._ksmd.set(knob, value)
        # Where few pages may share a copy, liars may leave one alone. Else all are merged, also those that liars know.
        which = range(1, NPAGES + 1) if self._sharing > 9 * NPAGES else range(NPAGES, 2 * NPAGES)
        honest = [self._join(0, which), self._join(0, which)]
        for _ in range(200):
            self._ksmd.do_scan()
            self._check()
            if all(slot.merged == NPAGES for slot in honest):
                break
        assert [slot.merged for slot in honest] == [NPAGES, NPAGES]

    def end(self) -> None:
        for slot in list(self._spaces):
            self._leave(slot)
        assert not self._ksmd.mm_list.domains(), "a domain that nobody is in"


def run_case(seed: int) -> None:
    """Raises what went wrong. No descriptor is left open, and memory stays in bounds."""
    before = _descriptors()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    resident = _memory("VmRSS")
    case = Case(seed)
    case.run()
    case.end()
    # What a liar sent, and nobody wants, is closed by a thread of its own (`wire.recv_memfd`).
    wait_until(lambda: _descriptors() <= before, "closed what was open", 10, every=0.001)
    most = _memory("VmHWM") - resident
    assert most <= MEMORY_MAX, f"it took {most >> 20} MiB"


def _descriptors() -> int:
    """How many this process has open."""
    return len(os.listdir("/proc/self/fd"))


def _memory(field: str) -> int:
    """Bytes, of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, help="this one case")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    ends, cases = time.monotonic() + args.seconds, 0
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(1 << 31)
    while cases == 0 or (args.seed is None and time.monotonic() < ends):
        try:
            run_case(seed)
        except Exception:
            traceback.print_exc()
            print(f"service: seed {seed} fails: python -m tests.fuzz.service --seed {seed}", file=sys.stderr)
            return 1
        seed, cases = seed + 1, cases + 1
    print(f"service: {cases} cases, the last of seed {seed - 1}, and nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
