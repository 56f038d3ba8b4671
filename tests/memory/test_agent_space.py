"""AgentAddressSpace: a process at the far end of a socket, honest or lying."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from samepage.memory import (
    AREA,
    EXTENT,
    NO_STALLS,
    PAGE_SIZE,
    RUN,
    ZERO_PAGE,
    AddressSpaceGone,
    PageStatus,
    RunKind,
    Stalls,
    wire,
)
from samepage.memory import agent as module
from samepage.memory.agent import DONATE_MAX, RUNS_MAX, AgentAddressSpace
from samepage.memory.extents import MERGE_MAX
from samepage.memory.handshake import Terms
from samepage.memory.segments import OPEN, MemfdSegment
from samepage.memory.wire import Op
from samepage.process.merge_domain import MergeDomain
from tests.service import fake_agent
from tests.service.fake_agent import BASE_VPN, FakeAgent, some_pages

Structured = npt.NDArray[np.void]
Make = Callable[..., tuple[AgentAddressSpace, FakeAgent]]


@pytest.fixture(autouse=True)
def short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT", 0.5)


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes an address space with a fake agent behind it, in a thread."""
    made: list[AgentAddressSpace] = []

    def make(npages: int = 8, seed: int = 1, **lies: fake_agent.Lie) -> tuple[AgentAddressSpace, FakeAgent]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        agent = FakeAgent(theirs, some_pages(seed, npages), {Op[op.upper()]: lie for op, lie in lies.items()})

        def run() -> None:
            agent.join()
            agent.serve()

        threading.Thread(target=run, daemon=True).start()
        space = AgentAddressSpace.welcome(ours, wire.recv(ours), os.getpid(), MergeDomain(1000), Terms())
        made.append(space)
        return space, agent

    yield make
    for space in made:
        space.close()


def extents(*rows: tuple[int, int, int]) -> Structured:
    return np.array([(BASE_VPN + vpn, npages, offset) for vpn, npages, offset in rows], EXTENT)


def runs(*rows: tuple[int, int]) -> Structured:
    return np.array([(BASE_VPN + vpn, npages) for vpn, npages in rows], AREA)


def settles_at(number: int) -> bool:
    """Whether so many memfds are open here, as soon as the fake agent, a thread of this process, closed its own."""
    deadline = time.monotonic() + 2
    while memfds() != number and time.monotonic() < deadline:
        time.sleep(0.01)
    return memfds() == number


def memfds() -> int:
    """How many descriptors of memfds are open here."""
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed: by the fake agent, or listdir's own
            found += os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:")
    return found


def test_the_handshake_passes_the_terms_and_the_userfaultfd(make: Make) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    agent = FakeAgent(theirs, some_pages(1, 1))
    said = []
    thread = threading.Thread(target=lambda: said.append(agent.join()))
    thread.start()
    fd = os.open("/dev/null", os.O_RDONLY)
    space = AgentAddressSpace.welcome(
        ours, wire.recv(ours), 42, MergeDomain(1000), Terms(reserve=5, section=8, flags=wire.Flags.NO_MOVE), fd
    )
    thread.join()
    assert (space.pid, space.domain, space.comm, space.swap) == (42, MergeDomain(1000), "fake", wire.Swap.MOVE)
    assert space.zero_checksum == agent.checksum(np.zeros(PAGE_SIZE, np.uint8))
    terms = said[0].reader().one(wire.WELCOME)
    assert terms == {"version": wire.VERSION, "flags": 2, "reserve": 5, "section": 8, "use_swap": 0}
    assert os.fstat(said[0].fd).st_rdev == os.fstat(fd).st_rdev
    said[0].close()
    os.close(fd)
    space.close()
    theirs.close()


@pytest.mark.parametrize("hello", [{"version": wire.VERSION + 1}, {"page_size": 65536}])
def test_an_agent_of_another_version_or_page_size_does_not_join(hello: dict[str, int]) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.send(FakeAgent(theirs, some_pages(1, 1)).hello(**hello))
    with ours, theirs, pytest.raises(AddressSpaceGone, match=r"version|pages"):
        AgentAddressSpace.welcome(ours, wire.recv(ours), 1, MergeDomain(0), Terms())


def test_an_agent_that_never_is_ready_does_not_join() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.send(FakeAgent(theirs, some_pages(1, 1)).hello())
    with ours, theirs, pytest.raises(AddressSpaceGone, match="in time"):
        AgentAddressSpace.welcome(ours, wire.recv(ours), 1, MergeDomain(0), Terms())


def test_a_scan_goes_over_every_page_once_and_then_over_what_was_written(make: Make) -> None:
    space, agent = make(npages=10)
    first = space.scan(0, 4)
    assert first.runs["kind"].tolist() == [RunKind.HASHED] * 4
    assert first.checksums.tolist() == [agent.checksum(p) for p in agent.pages[:4]]
    rest = space.scan(first.next_vpn, 100)
    assert (len(rest.checksums), rest.next_vpn) == (6, 0)
    agent.written[3] = True
    assert space.scan(0, 100).runs["vpn"].tolist() == [BASE_VPN + 3]


def test_a_donated_segment_merges_where_the_bytes_are_equal(make: Make) -> None:
    space, agent = make(npages=8)
    donation = space.donate(runs((0, 2), (5, 1)))
    assert donation.status.tolist() == [PageStatus.DONE] * 3
    assert isinstance(donation.segment, MemfdSegment)
    assert donation.segment.npages == 3
    result = space.merge(donation.segment, extents((0, 2, 0), (5, 1, 2), (6, 1, 0)))
    assert result.status.tolist() == [0, 0, 0, PageStatus.DIFFERENT]
    assert np.flatnonzero(agent.merged).tolist() == [0, 1, 5]
    donation.segment.close()


def test_zero_pages_are_merged_without_a_segment(make: Make) -> None:
    space, agent = make(npages=3)
    agent.pages[1] = 0
    assert space.merge(None, extents((0, 3, ZERO_PAGE))).status.tolist() == [1, 0, 1]


def test_a_break_tells_how_far_it_came(make: Make) -> None:
    space, agent = make(npages=8)
    agent.merged[:] = True
    agent.headroom = 5
    broken = space.break_ksm(BASE_VPN, 8)
    assert (broken.errno, broken.pages_unmerged, broken.pages_remaining) == (errno.ENOMEM, 0, 8)
    assert (broken.bytes_needed, broken.bytes_available) == (8 * PAGE_SIZE, 5)
    agent.headroom = 1 << 40
    assert space.break_ksm(BASE_VPN, 8).pages_unmerged == 8


def test_a_restore_tells_how_many_pages_stayed_as_they_were(make: Make) -> None:
    space, _ = make(npages=8)
    result = space.restore(np.array([(BASE_VPN, 3), (BASE_VPN + 4, 4)], AREA))
    assert (result.pages_restored, result.pages_left) == (5, 2)
    with pytest.raises(ValueError, match="runs"):
        space.restore(np.zeros(RUNS_MAX + 1, AREA))


def test_the_headroom_comes_with_the_name_of_the_memory_cgroup(make: Make) -> None:
    group, available = make()[0].headroom()
    assert available == 1 << 40
    assert f":{group}\n" in Path("/proc/self/cgroup").read_text()


@pytest.mark.parametrize("scan", [0xC0606610, 0xC06066FF], ids=["as now", "before Linux 6.7"])
def test_present_is_what_is_neither_absent_nor_the_zero_page(
    make: Make, scan: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of this process, which the fake agent says it is. A kernel without PAGEMAP_SCAN does not know its number."""
    monkeypatch.setattr("samepage.memory.pagemap.PAGEMAP_SCAN", scan)
    with mmap.mmap(-1, 16 * PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area.madvise(mmap.MADV_NOHUGEPAGE)
        for page in (2, 3, 9):
            area[page * PAGE_SIZE] = 1
        area[5 * PAGE_SIZE] = 0
        assert area[7 * PAGE_SIZE] == 0  # the zero page
        here = np.frombuffer(area, np.uint8)
        first = here.ctypes.data // PAGE_SIZE
        del here
        found = make()[0].present(first, 9)
        assert found.tolist() == [(first + 2, 2), (first + 5, 1)]
    assert len(make()[0].present((1 << 52) - 9, 9)) == 0


def test_of_a_process_that_ended_nothing_is_present() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ready = {"swap": 1, "tracking": 1, "zero_checksum": 0, "unnamed": 0}
    with theirs, contextlib.closing(AgentAddressSpace(ours, 1 << 30, MergeDomain(1000), "ended", ready)) as space:
        assert len(space.present(0, 100)) == 0


def test_the_map_count_is_passed_on(make: Make) -> None:
    assert make()[0].map_count() == (100, 32000)


def test_a_list_of_areas_longer_than_a_packet_comes_whole(make: Make) -> None:
    space, agent = make()
    agent.areas = np.array([(BASE_VPN + 2 * i, 1) for i in range(20_000)], AREA)
    areas = space.areas()
    assert areas.seq == 1
    assert (areas.ranges == agent.areas).all()
    assert len(agent.asked) == 3


def test_a_merge_longer_than_a_packet_is_split_and_every_status_is_in_order(make: Make) -> None:
    # Two fake pages stand for many: what counts is which extents arrive, in which packets.
    seen: list[Structured] = []

    def record(agent: FakeAgent, request: wire.Packet) -> tuple[bytes, int]:
        part = request.reader().rest(EXTENT)
        seen.append(part)
        status = np.concatenate([np.full(int(e["npages"]), e["vpn"] % 3, np.uint8) for e in part])
        body = wire.pack(wire.DONE, 10, len(status)) + status.tobytes()
        return wire.encode(request.op, request.seq, body), -1

    space, _ = make(merge=record)
    many = [(6000 * 300 + i, 1, i) for i in range(6000)]
    asked = np.array([(3, 2 * MERGE_MAX + 5, 7), (9 * MERGE_MAX, MERGE_MAX + 1, ZERO_PAGE), *many], EXTENT)
    result = space.merge(None, asked)
    arrived = np.concatenate(seen)
    assert all(part["npages"].sum() <= MERGE_MAX for part in seen)
    assert arrived["npages"].sum() == asked["npages"].sum() == len(result.status)
    assert arrived[:3].tolist() == [
        (3, MERGE_MAX - 3, 7),
        (MERGE_MAX, MERGE_MAX, 4 + MERGE_MAX),
        (2 * MERGE_MAX, 8, 4 + 2 * MERGE_MAX),
    ]
    assert set(arrived["offset"][3:5].tolist()) == {ZERO_PAGE}
    assert result.status[-6000:].tolist() == [vpn % 3 for vpn, _, _ in many]
    assert result.cpu_ns == 10 * len(seen)


def test_a_donation_that_cannot_be_one_segment_is_the_callers_mistake(make: Make) -> None:
    with pytest.raises(ValueError, match="at most"):
        make()[0].donate(runs((0, DONATE_MAX + 1)))


@pytest.mark.parametrize(
    "lie",
    [
        fake_agent.nothing,
        fake_agent.die,
        fake_agent.garbage,
        fake_agent.wrong_seq,
        fake_agent.wrong_op,
        fake_agent.too_short,
        fake_agent.too_long,
        fake_agent.oversize,
    ],
)
@pytest.mark.parametrize("op", ["areas", "scan", "donate", "merge", "break", "map_count", "headroom"])
def test_a_peer_that_hangs_dies_or_talks_nonsense_is_gone_for_good(make: Make, op: str, lie: fake_agent.Lie) -> None:
    space, _ = make(**{op: lie})
    calls = {
        "areas": space.areas,
        "scan": lambda: space.scan(0, 100),
        "donate": lambda: space.donate(runs((0, 1))),
        "merge": lambda: space.merge(None, extents((0, 1, ZERO_PAGE))),
        "break": lambda: space.break_ksm(BASE_VPN, 1),
        "map_count": space.map_count,
        "headroom": space.headroom,
    }
    before = memfds()
    with pytest.raises(AddressSpaceGone):
        calls[op]()
    started = time.monotonic()
    for call in calls.values():
        with pytest.raises(AddressSpaceGone):
            call()
    assert time.monotonic() - started < 0.2
    assert settles_at(before)


@pytest.mark.parametrize(
    "lie", [fake_agent.unsealed_segment, fake_agent.short_segment, fake_agent.no_segment, fake_agent.pipe_segment]
)
def test_a_segment_that_is_missing_short_or_could_change_is_refused(make: Make, lie: fake_agent.Lie) -> None:
    space, _ = make(donate=lie)
    with pytest.raises(AddressSpaceGone, match=r"seal|bytes instead|no segment|memfd"):
        space.donate(runs((0, 2)))


@pytest.mark.parametrize(("npages", "why"), [(1, "bytes instead of 0 pages"), (0, "0 pages donated, a segment of 0")])
def test_a_segment_for_a_donation_that_failed_is_refused(make: Make, npages: int, why: str) -> None:
    def lie(agent: FakeAgent, request: wire.Packet) -> tuple[bytes, int]:
        body = wire.pack(wire.DONE, 0, 2) + bytes([PageStatus.NOMEM] * 2)
        return wire.encode(request.op, request.seq, body), fake_agent.sealed(b"x" * npages * PAGE_SIZE)

    with pytest.raises(AddressSpaceGone, match=why):
        make(donate=lie)[0].donate(runs((0, 2)))


def test_an_unasked_descriptor_is_refused_and_closed(make: Make) -> None:
    def lie(agent: FakeAgent, request: wire.Packet) -> tuple[bytes, int]:
        return agent.honest(request)[0], os.memfd_create("x")

    space, _ = make(map_count=lie)
    before = memfds()
    with pytest.raises(AddressSpaceGone, match="descriptor"):
        space.map_count()
    assert settles_at(before)


@pytest.mark.parametrize(
    "areas",
    [
        [(BASE_VPN, 10), (BASE_VPN + 5, 10)],
        [(BASE_VPN + 50, 10), (BASE_VPN, 10)],
        [(BASE_VPN, 0)],
        [((1 << 64) - 1, 2)],
        [(5, (1 << 64) - 4)],
    ],
    ids=["overlapping", "descending", "empty", "past the end", "wrapping"],
)
def test_impossible_areas_are_refused(make: Make, areas: list[tuple[int, int]]) -> None:
    space, agent = make()

    def lie(agent: FakeAgent, request: wire.Packet) -> tuple[bytes, int]:
        body = wire.pack(wire.AREAS, 1, 0, 0, 0) + np.array(areas, AREA).tobytes()
        return wire.encode(request.op, request.seq, body), -1

    agent.lies[Op.AREAS] = lie
    with pytest.raises(AddressSpaceGone, match="areas"):
        space.areas()


def test_a_list_of_areas_that_never_ends_is_refused(make: Make) -> None:
    def lie(agent: FakeAgent, request: wire.Packet) -> tuple[bytes, int]:
        body = wire.pack(wire.AREAS, 1, BASE_VPN + 1, 0, 0) + np.array([(BASE_VPN, 1)], AREA).tobytes()
        return wire.encode(request.op, request.seq, body), -1

    with pytest.raises(AddressSpaceGone, match="order"):
        make(areas=lie)[0].areas()


def test_a_list_of_areas_that_changes_all_the_time_is_taken_and_asked_for_again(make: Make) -> None:
    changes = iter(range(100))

    def restless(agent: FakeAgent, request: wire.Packet) -> tuple[bytes, int]:
        data, _ = agent.honest(request)
        start = request.reader().take("<u8", 1)[0]
        seq = next(changes)
        body = bytearray(data[wire.HDR.itemsize :])
        body[:8] = seq.to_bytes(8, "little")
        assert start in (0, agent.areas["vpn"][8189])
        return wire.encode(request.op, request.seq, bytes(body)), -1

    space, agent = make(areas=restless)
    agent.areas = np.array([(BASE_VPN + 2 * i, 1) for i in range(10_000)], AREA)
    areas = space.areas()
    assert (areas.ranges == agent.areas).all()
    assert areas.seq not in range(100)


@pytest.mark.parametrize(
    ("head", "rows", "why"),
    [
        ((0, 1, 0, 1, 1), [(BASE_VPN, 2, 0, 0, 0)], "checksums"),
        ((0, 1, 0, 1, 9), [(BASE_VPN, 9, 0, 0, 0)], "checksums"),
        ((0, 1, 0, 1, 0), [(BASE_VPN, 2, 4, 0, 0)], "kind"),
        ((0, 1, 0, 2, 0), [(BASE_VPN, 2, 1, 0, 0), (BASE_VPN + 1, 2, 1, 0, 0)], "overlap"),
        ((0, 1, 0, 2, 0), [(BASE_VPN, 2, 2, 0, 0), (BASE_VPN + 1, 2, 2, 0, 0)], "overlap"),
        ((BASE_VPN, 1, 0, 1, 0), [(BASE_VPN, 2, 1, 0, 0)], "go on"),
        ((1, 1, 0, 1, 0), [(0, 2, 1, 0, 0)], "go on"),
    ],
    ids=["count", "budget", "kind", "overlap", "gone twice", "backwards", "into itself"],
)
def test_a_scan_that_cannot_be_true_is_refused(
    make: Make, head: tuple[int, ...], rows: list[tuple[int, ...]], why: str
):
    def lie(agent: FakeAgent, request: wire.Packet) -> tuple[bytes, int]:
        body = wire.pack(wire.SCANNED, *head, 0, 0, b"") + np.array(rows, RUN).tobytes() + bytes(8 * head[4])
        return wire.encode(request.op, request.seq, body), -1

    with pytest.raises(AddressSpaceGone, match=why):
        make(scan=lie)[0].scan(0, 8)


def test_stalls_are_told_of_once(make: Make) -> None:
    space, agent = make()
    agent.stalls = np.array((1_040_000, (2, 0, 0, 0, 1, 0, 0, 0)), wire.STALLS).tobytes()
    assert space.scan(BASE_VPN, 8).stalls == Stalls((2, 0, 0, 0, 1, 0, 0, 0), 1_040_000)
    assert space.scan(BASE_VPN, 8).stalls == NO_STALLS


@pytest.mark.parametrize(
    ("count", "us"), [((1, 0, 0, 0, 0, 0, 0, 0), 31), ((0, 0, 0, 0, 0, 0, 0, 2), 199_999), ((0,) * 8, 1)]
)
def test_stalls_that_cannot_have_taken_so_long_are_refused(make: Make, count: tuple[int, ...], us: int) -> None:
    space, agent = make()
    agent.stalls = np.array((us * 1000, count), wire.STALLS).tobytes()
    with pytest.raises(AddressSpaceGone, match="stalls"):
        space.scan(BASE_VPN, 8)


@pytest.mark.parametrize("restored", [(9, 0, 0), (4, 5, 0), ((1 << 64) - 1, 1, 0)])
def test_a_restore_that_cannot_be_true_is_refused(make: Make, restored: tuple[int, ...]) -> None:
    def lie(agent: FakeAgent, request: wire.Packet) -> tuple[bytes, int]:
        return wire.encode(request.op, request.seq, wire.pack(wire.RESTORED, *restored)), -1

    with pytest.raises(AddressSpaceGone, match="restore"):
        make(restore=lie)[0].restore(np.array([(BASE_VPN, 3), (BASE_VPN + 4, 5)], AREA))


@pytest.mark.parametrize("broken", [(9, 0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, errno.EPERM, 0)])
def test_a_break_that_cannot_be_true_is_refused(make: Make, broken: tuple[int, ...]) -> None:
    def lie(agent: FakeAgent, request: wire.Packet) -> tuple[bytes, int]:
        return wire.encode(request.op, request.seq, wire.pack(wire.BROKEN, *broken)), -1

    with pytest.raises(AddressSpaceGone, match=r"break|broken"):
        make(**{"break": lie})[0].break_ksm(BASE_VPN, 8)


@pytest.mark.parametrize("status", [PageStatus.DIFFERENT, PageStatus.NOMAP, 77])
def test_a_donation_that_failed_as_none_can_is_refused(make: Make, status: int) -> None:
    """Nothing is compared or mapped for it."""

    def lie(agent: FakeAgent, request: wire.Packet) -> tuple[bytes, int]:
        body = wire.pack(wire.DONE, 0, 2) + bytes([PageStatus.DONE, status])
        return wire.encode(request.op, request.seq, body), fake_agent.sealed(b"x" * PAGE_SIZE)

    before = memfds()
    with pytest.raises(AddressSpaceGone, match="talks nonsense"):
        make(donate=lie)[0].donate(runs((0, 2)))
    assert settles_at(before)


def test_an_endless_list_of_areas_ends_soon(make: Make) -> None:
    def endless(agent: FakeAgent, request: wire.Packet) -> tuple[bytes, int]:
        start = int(request.reader().take("<u8", 1)[0])
        part = np.array([(start + 2 * i, 1) for i in range(8000)], AREA)
        head = wire.pack(wire.AREAS, 1, start + 2 * 8000, 0, 0)
        return wire.encode(request.op, request.seq, head + part.tobytes()), -1

    space, agent = make(areas=endless)
    with pytest.raises(AddressSpaceGone, match="more than 1048576 areas"):
        space.areas()
    assert len(agent.asked) == 132


def test_a_donation_for_which_no_descriptor_is_left_is_no_lie(make: Make) -> None:
    copies = [fake_agent.sealed(bytes(2 * PAGE_SIZE)) for _ in range(2)]

    def donated_before(agent: FakeAgent, request: wire.Packet) -> tuple[bytes, int]:
        body = wire.pack(wire.DONE, 0, 2) + bytes(2)
        return wire.encode(request.op, request.seq, body), copies.pop()

    space, _ = make(donate=donated_before)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        donation = space.donate(runs((0, 2)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert donation.segment is None
    assert donation.status.tolist() == [PageStatus.NOMEM] * 2
    assert space.gone is None
    donation = space.donate(runs((0, 2)))
    assert donation.segment is not None
    donation.close()


def test_nobody_is_asked_for_a_copy_for_which_there_is_no_descriptor(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    space, agent = make()
    monkeypatch.setattr(OPEN, "most", OPEN.count)
    assert space.donate(runs((0, 2))).status.tolist() == [PageStatus.NOMEM] * 2
    assert not agent.asked
