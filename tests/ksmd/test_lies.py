"""Processes whose agents lie: nobody else notices."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest

from samepage.ksmd import Ksmd
from samepage.ksmd.mm_slot import Structured
from samepage.memory import (
    VPN_END,
    AddressSpaceGone,
    BreakResult,
    Donation,
    MergeResult,
    PageStatus,
    ScanFlag,
    ScanResult,
    Segment,
)
from samepage.memory import check as check_answer
from samepage.memory.simulated import SimulatedAddressSpace
from samepage.memory.simulated_memory import SimulatedMachine
from tests.ksmd.simulation import BASE, SAME, check, new_ksmd, passes, process, processes


def test_who_lies_about_a_page_does_not_keep_others_from_each_other_for_ever() -> None:
    machine, ksmd = SimulatedMachine(), new_ksmd()
    (liar, _), slots = processes(machine, ksmd, [7], [7])
    liar.script = lambda what, vpn: PageStatus.DIFFERENT if what == "merge" else None
    passes(ksmd, 6)
    ksmd.exit(slots[0])
    slots[0] = ksmd.enter(process(machine, 300, [7]))
    passes(ksmd, 40)
    assert [slot.merged for slot in slots] == [1, 1]


class Liar(SimulatedAddressSpace):
    """A process whose agent answers what a test tells it to; its answers are looked at as those of a real one are."""

    def __init__(self, machine: SimulatedMachine, lie: str, answer: Any) -> None:
        super().__init__(machine, 666)
        self.lie, self.answer = lie, answer
        self.map_area(BASE, 256)
        self.write(BASE, *SAME)

    def scan(self, vpn: int, budget: int, flags: ScanFlag = ScanFlag.NONE, end: int = VPN_END) -> ScanResult:
        reply = super().scan(vpn, budget, flags, end)
        if self.lie == "scan":
            for name, value in self.answer.items():
                setattr(reply, name, value(reply) if callable(value) else value)
            check_answer.scanned(reply, vpn, budget)
        return reply

    def donate(self, runs: Structured) -> Donation:
        donation = super().donate(runs)
        if self.lie == "donate":
            segment, donation = donation.segment, self.answer(donation)
            try:
                check_answer.donated(donation, int(runs["npages"].sum()))
            except AddressSpaceGone:
                if segment is not None:
                    segment.close()
                raise
        return donation

    def merge(self, segment: Segment | None, extents: Structured) -> MergeResult:
        result = super().merge(segment, extents)
        if self.lie == "merge":
            result = self.answer(result)
            check_answer.statuses(result.status, int(extents["npages"].sum()))
        return result

    def break_ksm(self, vpn: int, npages: int) -> BreakResult:
        result = super().break_ksm(vpn, npages)
        if self.lie == "break":
            result = self.answer(result)
            check_answer.broken(result, npages)
        return result


def _runs(reply: ScanResult, **fields: int) -> Structured:
    runs = reply.runs.copy()
    for name, value in fields.items():
        runs[name] = value
    return runs


LIES: dict[str, tuple[str, Any]] = {
    "runs outside its areas": ("scan", {"runs": lambda r: _runs(r, vpn=5)}),
    "runs beyond any address": ("scan", {"runs": lambda r: _runs(r, vpn=(1 << 64) - 3)}),
    "runs twice": ("scan", {"runs": lambda r: np.concatenate([r.runs, r.runs]),
                            "checksums": lambda r: np.concatenate([r.checksums, r.checksums])}),
    "empty runs": ("scan", {"runs": lambda r: _runs(r, npages=0), "checksums": lambda r: r.checksums[:0]}),
    "unknown kinds": ("scan", {"runs": lambda r: _runs(r, kind=9)}),
    "too few checksums": ("scan", {"checksums": lambda r: r.checksums[1:]}),
    "a scan that stands still": ("scan", {"next_vpn": 1, "runs": lambda r: r.runs, "cpu_ns": -1}),
    "a status too few": ("donate", lambda d: Donation(d.segment, d.status[1:])),
    "pages it did not copy": ("donate", lambda d: Donation(d.segment.close(), d.status)),
    "an unknown status": ("merge", lambda m: MergeResult(m.status + np.uint8(50))),
    "too many statuses": ("merge", lambda m: MergeResult(np.append(m.status, np.uint8(0)))),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_process_that_talks_nonsense_is_dropped_and_nobody_else_notices(
    machine: SimulatedMachine, ksmd: Ksmd, lie: tuple[str, Any]
) -> None:
    liar = ksmd.enter(Liar(machine, *lie))
    (a, b), _ = processes(machine, ksmd, SAME, SAME)
    passes(ksmd, 3)
    assert liar.gone
    assert len(a.merged_pages()) == len(b.merged_pages()) == 50
    check(ksmd, machine, {})


@pytest.mark.parametrize(
    "answer",
    [BreakResult(errno=999), BreakResult(pages_unmerged=1 << 40), BreakResult(pages_remaining=-1)],
    ids=["unknown errno", "too many pages", "less than no pages"],
)
def test_a_break_that_talks_nonsense_is_as_good_as_none(
    machine: SimulatedMachine, ksmd: Ksmd, answer: BreakResult
) -> None:
    slot = ksmd.enter(Liar(machine, "break", lambda _: answer))
    processes(machine, ksmd, SAME)
    passes(ksmd, 3)
    result = ksmd.unmerge(slot)  # it may still have merged pages, and nothing is known of them
    assert (result.errno, result.pages_unmerged) == (errno.ETIMEDOUT if result.pages_remaining else 0, 0)
    assert slot.gone
    assert ksmd.slots(666) == []


def test_found_pages_of_impossible_segments_are_not_counted(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    def found(reply: ScanResult) -> Structured:
        return _runs(reply, kind=3, ino=77, offset=(1 << 63))

    slot = ksmd.enter(Liar(machine, "scan", {"runs": found, "checksums": lambda r: r.checksums[:0]}))
    passes(ksmd, 3)
    assert not slot.gone
    assert ksmd.counters().pages_sharing == 0
    assert ksmd.rows()[0].merged == 0
