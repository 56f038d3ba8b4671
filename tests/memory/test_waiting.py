"""AgentAddressSpace: how long callers wait for an answer, and what wakes them."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from samepage.memory import (
    AREA,
    EXTENT,
    ZERO_PAGE,
    AddressSpaceGone,
    AddressSpaceSilent,
    PageStatus,
    ScanResult,
    conversation,
    wire,
)
from samepage.memory import agent as module
from samepage.memory.agent import AgentAddressSpace
from samepage.process.halt import Work
from samepage.process.identity import identify
from samepage.process.merge_domain import MergeDomain
from tests.memory.test_agent_space import Make, make, runs, short_timeout
from tests.service import fake_agent
from tests.service.fake_agent import BASE_VPN, FakeAgent

__all__ = ["make", "short_timeout"]


def test_hanging_up_wakes_whoever_waits_for_an_answer(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT", 30)
    space, _ = make(scan=fake_agent.nothing)
    threading.Timer(0.1, space.hang_up).start()
    started = time.monotonic()
    with pytest.raises(AddressSpaceGone):
        space.scan(0, 1)
    assert time.monotonic() - started < 5


def test_a_request_does_not_wait_for_the_answer_to_the_one_before(make: Make) -> None:
    def answer_once_the_next_is_there(agent: FakeAgent, request: wire.Packet) -> tuple[bytes, int]:
        if len(agent.asked) == 1:
            assert select.select([agent.sock], [], [], 0.4)[0]
        return agent.honest(request)

    space, agent = make(scan=answer_once_the_next_is_there)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda budget: len(space.scan(0, budget).checksums), (3, 5))
    assert first + second == 8
    assert len(agent.asked) == 2


def test_of_several_who_wait_each_gets_its_own_answer(make: Make) -> None:
    space, _ = make(npages=64)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: len(space.donate(np.array([(BASE_VPN, n)], AREA)).status), range(1, 65)))
    assert found == list(range(1, 65))


def test_whoever_waits_behind_an_answer_that_makes_no_sense_is_told_too(make: Make) -> None:
    space, _ = make(scan=lambda _, request: (wire.encode(request.op, request.seq + 7), -1))

    def ask(_: int) -> bool:
        with pytest.raises(AddressSpaceGone):
            space.scan(0, 1)
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(4)))


def test_a_descriptor_that_would_block_whoever_closes_it_blocks_nobody(make: Make) -> None:
    """A TCP socket with SO_LINGER and data that nobody takes: the last to close it waits."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def lingering() -> int:
            sock = socket.create_connection(server.getsockname())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 3))
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    sock.send(b"x" * (1 << 20))
            return sock.detach()

        def lie(agent: FakeAgent, request: wire.Packet) -> tuple[bytes, int]:
            return agent.honest(request)[0], lingering()

        for op, ask in (
            ("map_count", lambda space: space.map_count()),
            ("donate", lambda space: space.donate(runs((0, 2)))),
        ):
            space, _ = make(**{op: lie})
            started = time.monotonic()
            with pytest.raises(AddressSpaceGone):
                ask(space)
            assert time.monotonic() - started < 2
            assert space.doubtful


def test_nobody_waits_long_for_a_break_of_more_pages_than_a_process_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samepage.memory.agent.memory_of", lambda pid: 4000)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ready = {"swap": 1, "tracking": 1, "zero_checksum": 0, "unnamed": 0}
    space = AgentAddressSpace(ours, os.getpid(), MergeDomain(0), "guest", ready, identify(os.getpid()))
    space.hurry = 0.1
    began = time.monotonic()
    with ours, theirs, pytest.raises(AddressSpaceSilent):
        space.break_ksm(1, 1 << 24)  # for which a process may take seventeen minutes
    assert time.monotonic() - began < 5.0


def test_who_has_little_time_for_an_answer_and_is_slow_gets_on_all_the_same(make: Make) -> None:
    """A guest on a slow machine, at a fifth of a millisecond a page: 4,096 pages take
    most of a second."""

    def slow(agent: FakeAgent, request: wire.Packet) -> tuple[bytes, int]:
        npages = int(request.reader().rest(EXTENT)["npages"].sum())
        time.sleep(npages / 5_000)
        status = np.full(npages, PageStatus.DONE, np.uint8)
        return wire.encode(request.op, request.seq, wire.pack(wire.DONE, 10, npages) + status.tobytes()), -1

    space, _ = make(merge=slow)
    space.hurry = 0.2
    began = time.monotonic()
    status = space.merge(None, np.array([(BASE_VPN, 4096, ZERO_PAGE)], EXTENT)).status
    assert time.monotonic() - began < 0.8  # and is not waited for until it has merged all
    done = np.count_nonzero(status == PageStatus.DONE)
    assert done >= 512
    assert (status[:done] == PageStatus.DONE).all()
    assert (status[done:] == PageStatus.BUSY).all()
    assert len(status) == 4096


def test_who_has_little_time_for_an_answer_has_more_for_a_copy_of_many_pages(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BREAK_RATE", 400 << 10)  # ten seconds for these, so that a busy machine has time, too
    space, _ = make(npages=1024, donate=late(0.3))
    space.hurry = 0.1
    assert (space.donate(runs((0, 1024))).status == PageStatus.DONE).all()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """An answer that takes 0.2 s is late, and one that takes 1.5 s is not waited for however busy the process is. Says
    whether it is."""
    monkeypatch.setattr(conversation, "TIMEOUT", 0.2)
    monkeypatch.setattr(conversation, "LONGEST", 1.5)
    monkeypatch.setattr(conversation, "LOOK_EVERY", 0.05)
    return lambda busy: monkeypatch.setattr(conversation, "work_of", lambda *_: Work(busy, 0))


def late(seconds: float) -> fake_agent.Lie:
    def answer(agent: FakeAgent, request: wire.Packet) -> tuple[bytes, int]:
        time.sleep(seconds)
        return agent.honest(request)

    return answer


def caught_up(space: AgentAddressSpace) -> list[ScanResult]:
    found: list[ScanResult] = []
    silent = "silent"
    while silent:
        time.sleep(0.02)
        silent, more = space.catch_up()
        found += more
    return found


def test_one_that_is_at_work_may_be_late_and_nobody_waits_for_it(make: Make, hasty: Callable[[bool], None]) -> None:
    hasty(True)
    space, _ = make(scan=late(0.9))
    began = time.monotonic()
    with pytest.raises(AddressSpaceSilent):
        space.scan(0, 8)
    assert time.monotonic() - began < 0.7
    assert [len(scan.checksums) for scan in caught_up(space)] == [8]
    assert len(space.areas().ranges)


def test_one_that_is_late_and_not_at_work_is_dropped(make: Make, hasty: Callable[[bool], None]) -> None:
    hasty(False)
    space, _ = make(scan=late(0.9))
    with pytest.raises(AddressSpaceGone, match="no answer in time"):
        space.scan(0, 8)


def test_one_that_is_late_for_good_is_dropped_however_busy_it_is(make: Make, hasty: Callable[[bool], None]) -> None:
    hasty(True)
    space, _ = make(scan=lambda *_: None)
    began = time.monotonic()
    with pytest.raises(AddressSpaceSilent):
        space.scan(0, 8)
    with pytest.raises(AddressSpaceGone, match="no answer in time"):
        caught_up(space)
    assert 1.0 < time.monotonic() - began < 4.0


def test_one_that_fell_asleep_is_dropped_at_the_next_look(make: Make, hasty: Callable[[bool], None]) -> None:
    hasty(True)
    space, _ = make(scan=lambda *_: None)
    with pytest.raises(AddressSpaceSilent):
        space.scan(0, 8)
    hasty(False)
    began = time.monotonic()
    with pytest.raises(AddressSpaceGone, match="no answer in time"):
        caught_up(space)
    assert time.monotonic() - began < 1.0
