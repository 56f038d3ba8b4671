"""A segment is given to those alone who proved that they have a page of it."""

from __future__ import annotations

import os
import socket
import threading
from typing import Any

import numpy as np
import pytest

from samepage.memory import PAGE_SIZE, ZERO_PAGE, PageStatus, wire
from samepage.memory.proof import AHEAD, AT_FIRST, expected
from samepage.memory.wire import Op
from samepage.service.control import Client
from tests.memory.test_agent_space import Make, extents, make, runs, short_timeout
from tests.service.fake_agent import BASE_VPN, FakeAgent, some_pages
from tests.service.test_server import NPAGES, Start, both_merged, folder, path, start, until

__all__ = ["folder", "make", "path", "short_timeout", "start"]

DIFFERENT = int(PageStatus.DIFFERENT)


class Namer(FakeAgent):
    """Claims the pages of `others`, whatever it has itself."""

    def __init__(self, sock: socket.socket, pages: Any, others: Any) -> None:
        super().__init__(sock, pages)
        self._sums = {
            page.tobytes(): super(Namer, self).checksum(other) for page, other in zip(pages, others, strict=True)
        }
        self.given = 0

    def checksum(self, page: Any) -> int:
        return self._sums.get(page.tobytes(), super().checksum(page))

    def merge_extent(self, fd: int, vpn: int, npages: int, offset: int) -> Any:
        self.given += 1
        return super().merge_extent(fd, vpn, npages, offset)


def asked(agent: FakeAgent, op: Op) -> int:
    return [of for of, _ in agent.asked].count(op)


@pytest.mark.parametrize("late", [False, True], ids=["when they find one another", "when they share already"])
def test_who_only_names_the_checksums_of_others_is_given_none_of_their_pages(
    path: str, start: Start, late: bool
) -> None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    namer = Namer(sock, some_pages(2, NPAGES), some_pages(1, NPAGES))

    def join() -> None:
        sock.connect(path)
        namer.join()
        threading.Thread(target=namer.serve, daemon=True).start()

    with Client(path) as client:
        client.ask("set", knob="run", value="0")
        a, b = start(1), start(1)
        if not late:
            join()
        client.ask("set", knob="run", value="1")
    until(lambda: both_merged(path, a, b))
    if late:
        join()
    until(lambda: asked(namer, Op.PROVE) > 0)
    passes = asked(namer, Op.SCAN)
    until(lambda: asked(namer, Op.SCAN) > passes + 5)
    assert namer.given == 0
    assert both_merged(path, a, b)


def test_of_pages_that_are_all_different_each_is_refuted_and_the_process_stays(make: Make) -> None:
    donation = make(npages=100)[0].donate(runs((0, 100)))
    space, agent = make(npages=100, seed=2)
    assert space.merge(donation.segment, extents((0, 100, 0))).status.tolist() == [DIFFERENT] * 100
    assert asked(agent, Op.MERGE) == 0
    assert asked(agent, Op.PROVE) <= 3
    donation.close()


def test_of_zeros_nothing_is_proved_nor_is_a_segment_given_for_them(make: Make) -> None:
    donation = make(npages=4)[0].donate(runs((0, 4)))
    space, agent = make(npages=8, seed=2)
    agent.pages[1] = 0
    zeros = extents((0, 1, 0), (1, 2, ZERO_PAGE), (4, 1, 2))
    assert space.merge(donation.segment, zeros).status.tolist() == [DIFFERENT, 0, DIFFERENT, DIFFERENT]
    assert space.merge(donation.segment, zeros[1:2]).status.tolist() == [0, DIFFERENT]
    agent.pages[4] = some_pages(1, 4)[2]
    assert space.merge(donation.segment, zeros).status.tolist() == [DIFFERENT, 0, DIFFERENT, 0]
    donation.close()


@pytest.mark.parametrize("same", [1, 50, 99])
def test_pages_that_were_just_written_cost_the_others_nothing(make: Make, same: int) -> None:
    donation = make(npages=100)[0].donate(runs((0, 100)))
    space, agent = make(npages=100)
    agent.pages[same:, 7] ^= 1
    wanted = [0] * same + [DIFFERENT] * (100 - same)
    assert space.merge(donation.segment, extents((0, 100, 0))).status.tolist() == wanted
    donation.close()


def test_a_process_proves_once_what_it_has_of_a_segment_and_nothing_of_its_own(make: Make) -> None:
    donor, its_agent = make(npages=100)
    donation = donor.donate(runs((0, 100)))
    donor.merge(donation.segment, extents((0, 100, 0)))
    assert asked(its_agent, Op.PROVE) == 0
    space, agent = make(npages=100)
    for vpn in (0, 50):
        assert not space.merge(donation.segment, extents((vpn, 50, vpn))).status.any()
    assert agent.asked[-3:-2] == [(Op.PROVE, wire.KEY_SIZE + 8 * AT_FIRST)]
    assert asked(agent, Op.PROVE) == 1
    donation.close()


def test_what_is_proved_ahead_is_asked_for_once_for_all_segments_also_those_still_to_be_made(make: Make) -> None:
    donor = make(npages=100)[0]
    there = donor.donate(runs((0, 50)))
    space, agent = make(npages=100)
    space.prove_ahead([(there.segment, BASE_VPN + np.arange(50)), (None, BASE_VPN + np.arange(50, 100))])
    to_come = donor.donate(runs((50, 50)))
    for donation, vpn in ((there, 0), (to_come, 50)):
        assert not space.merge(donation.segment, extents((vpn, 10, 0), (vpn + 10, 40, 10))).status.any()
        donation.close()
    assert [of for of in agent.asked if of[0] == Op.PROVE] == [(Op.PROVE, wire.KEY_SIZE + 8 * 2 * AHEAD)]


def test_pages_that_were_written_since_they_were_proved_are_asked_for_again(make: Make) -> None:
    donation = make(npages=100)[0].donate(runs((0, 100)))
    for written, wanted in ((100, [DIFFERENT] * 100), (99, [DIFFERENT] * 99 + [0])):
        space, agent = make(npages=100)
        agent.pages[:written, 7] ^= 1
        space.prove_ahead([(donation.segment, BASE_VPN + np.arange(written)), (None, BASE_VPN + np.arange(written))])
        assert space.merge(donation.segment, extents((0, 100, 0))).status.tolist() == wanted
        assert asked(agent, Op.PROVE) >= 2
    donation.close()


def test_what_was_proved_of_other_pages_says_nothing_of_these(make: Make) -> None:
    """Whoever has the second page of a segment as its own tenth has not proved the first."""
    donation = make(npages=2)[0].donate(runs((0, 2)))
    space, agent = make(npages=20, seed=2)
    agent.pages[10] = some_pages(1, 2)[1]
    space.prove_ahead([(donation.segment, np.array([BASE_VPN + 10])), (None, np.array([BASE_VPN + 10]))])
    assert space.merge(donation.segment, extents((3, 2, 0))).status.tolist() == [DIFFERENT] * 2
    assert asked(agent, Op.MERGE) == 0
    donation.close()


def test_a_proof_is_good_for_one_question(make: Make) -> None:
    """Who looks on when somebody else proves what it has cannot say the same."""
    donation = make(npages=1)[0].donate(runs((0, 1)))
    honest, agent = make(npages=1)
    overheard: list[bytes] = []

    def listen(agent: FakeAgent, request: wire.Packet) -> tuple[bytes, int]:
        answer = agent.honest(request)
        overheard.append(answer[0][wire.HDR.itemsize :])
        return answer

    agent.lies[Op.PROVE] = listen
    assert not honest.merge(donation.segment, extents((0, 1, 0))).status.any()
    liar, _ = make(npages=1, prove=lambda _, request: (wire.encode(request.op, request.seq, overheard[0]), -1))
    assert liar.merge(donation.segment, extents((0, 1, 0))).status.tolist() == [DIFFERENT]
    donation.close()


def test_what_cannot_be_proved_says_why(make: Make) -> None:
    def gone(agent: FakeAgent, request: wire.Packet) -> tuple[bytes, int]:
        body = wire.pack(wire.DONE, 0, 2) + bytes([PageStatus.GONE, PageStatus.NOMEM]) + bytes(2 * wire.PROOF_SIZE)
        return wire.encode(request.op, request.seq, body), -1

    donation = make()[0].donate(runs((0, 2)))
    found = make(prove=gone)[0].merge(donation.segment, extents((0, 2, 0))).status.tolist()
    assert sorted(found) == [PageStatus.GONE, PageStatus.NOMEM]
    donation.close()


def test_nothing_is_no_page() -> None:
    key = os.urandom(wire.KEY_SIZE)
    assert expected(key, b"") == b""
    assert len(expected(key, bytes(PAGE_SIZE))) == wire.PROOF_SIZE
