"""The knobs take what the kernel's take, and the advisor does what they say."""

from __future__ import annotations

import errno
import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from samepage import commands
from samepage.ksmd import KNOBS, Advisor, Knobs, Ksmd, budget, exchange, match
from samepage.ksmd.advisor import BREAK_SECONDS, BURST_PAGES, FAULT_SECONDS, IDLE_SECONDS, LONGEST_SECONDS
from samepage.memory import VPN_END, PageStatus, ScanFlag, ScanResult
from samepage.memory.simulated_memory import SimulatedMachine
from tests.ksmd.simulation import BASE, Clock, new_ksmd, passes, process, processes

SAME = range(1, 51)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("run", 3),
        ("run", "yes"),
        ("sleep_millisecs", -1),
        ("max_page_sharing", 1),
        ("use_zero_pages", 2),
        ("advisor_mode", "fast"),
        ("smart_scan", 2),
        ("merge_across_nodes", 2),
        ("stable_node_chains_prune_millisecs", -1),
        ("max_page_sharing", 1 << 31),
        ("pages_to_scan", 1 << 32),
        ("advisor_target_scan_time", 0),
        ("advisor_max_cpu", -1),
    ],
)
def test_bad_values_are_invalid_and_change_nothing(name: str, value: str | int) -> None:
    ksmd = new_ksmd()
    before = ksmd.knobs()
    with pytest.raises(OSError, match="Invalid argument") as caught:
        ksmd.set(name, value)
    assert caught.value.errno == errno.EINVAL
    assert ksmd.knobs() == before


@pytest.mark.parametrize("mode", ["cpu", "scan-time", "none"])
def test_values_that_make_no_sense_are_taken_and_merging_goes_on(mode: str) -> None:
    machine, clock = SimulatedMachine(), Clock()
    ksmd = new_ksmd(clock)
    ksmd.set("advisor_mode", mode)
    for name, value in (
        ("max_page_sharing", (1 << 31) - 1),
        ("advisor_max_cpu", 0),
        ("advisor_target_scan_time", (1 << 64) - 1),
        ("advisor_min_pages_to_scan", (1 << 64) - 1),
        ("advisor_max_pages_to_scan", 0),
    ):
        ksmd.set(name, value)
        assert ksmd.get(name) == str(value)
    (a, b), _ = processes(machine, ksmd, range(1, 51), range(1, 51))
    for _ in range(2000):
        ksmd.do_scan()
        clock.now += min(ksmd.next_wait(), 60.0)
    assert len(a.merged_pages()) == len(b.merged_pages()) == 50


def test_with_no_pages_to_scan_nothing_is_scanned_and_nobody_is_busy_with_it() -> None:
    machine, ksmd = SimulatedMachine(), new_ksmd()
    ksmd.set("pages_to_scan", 0)
    ksmd.set("sleep_millisecs", 0)
    processes(machine, ksmd, [1, 2])
    assert [ksmd.do_scan() for _ in range(3)] == [0, 0, 0]
    assert ksmd.next_wait() >= 1


def test_unknown_knobs_are_unknown() -> None:
    ksmd = new_ksmd()
    with pytest.raises(KeyError):
        ksmd.get("speed")
    with pytest.raises(KeyError):
        ksmd.set("speed", 1)


def test_every_knob_takes_its_own_value_back_as_text() -> None:
    ksmd = new_ksmd()
    ksmd.set("advisor_mode", "none")
    for name, value in ksmd.knobs().items():
        ksmd.set(name, value)
        assert ksmd.get(name) == value


@pytest.mark.parametrize(("name", "value"), [("max_page_sharing", "10"), ("merge_across_nodes", "0")])
def test_what_cannot_be_changed_while_pages_are_merged_is_busy(name: str, value: str) -> None:
    ksmd = new_ksmd()
    processes(SimulatedMachine(), ksmd, SAME, SAME)
    passes(ksmd, 2)
    with pytest.raises(OSError, match="busy") as caught:
        ksmd.set(name, value)
    assert caught.value.errno == errno.EBUSY
    ksmd.set("run", 2)
    ksmd.set(name, value)
    assert ksmd.get(name) == value


def test_smart_scan_passes_over_what_was_not_written_and_without_it_everything_is_looked_at() -> None:
    ksmd = new_ksmd()
    processes(SimulatedMachine(), ksmd, SAME)
    passes(ksmd, 3)
    counters = ksmd.counters()
    assert (counters.pages_scanned, counters.pages_skipped) == (50, 100)
    ksmd.set("smart_scan", 0)
    passes(ksmd, 3)
    counters = ksmd.counters()
    assert (counters.pages_scanned, counters.pages_skipped) == (50 + 150, 100)
    assert counters.pages_unshared == 50


def test_while_nothing_happens_broken_pages_are_looked_for_ever_more_rarely() -> None:
    """After 1, 2, 4 and then 8 passes; again in each once something happens in the process, and without smart_scan."""
    ksmd = new_ksmd()
    (a, _), _ = processes(SimulatedMachine(), ksmd, SAME, SAME)
    scan = a.scan
    flags: list[ScanFlag] = []

    def noted(vpn: int, budget: int, how: ScanFlag = ScanFlag.NONE, end: int = VPN_END) -> ScanResult:
        flags.append(how)
        return scan(vpn, budget, how, end)

    setattr(a, "scan", noted)  # noqa: B010
    passes(ksmd, 3)  # after the second they are merged
    flags.clear()
    passes(ksmd, 32)
    looked = [i for i, how in enumerate(flags) if not how & ScanFlag.STILL]
    assert np.diff(looked).tolist() == [2, 3, 5, 9, 9]
    sharing = ksmd.counters().pages_sharing
    a.write(BASE, 99)
    passes(ksmd, 9)
    assert ksmd.counters().pages_sharing == sharing - 1
    flags.clear()
    passes(ksmd, 2)
    assert ScanFlag.STILL in flags
    flags.clear()
    ksmd.set("smart_scan", 0)
    passes(ksmd, 10)
    assert not any(how & ScanFlag.STILL for how in flags)


def test_without_smart_scan_what_failed_is_tried_in_every_pass() -> None:
    ksmd = new_ksmd()
    ksmd.set("smart_scan", 0)
    (a, b), _ = processes(SimulatedMachine(), ksmd, [1], [1])
    a.script = b.script = lambda what, vpn: PageStatus.BUSY if what != "scan" else None
    for _ in range(10):
        passes(ksmd)
    assert a.calls.count("donate") + b.calls.count("donate") >= 8


@pytest.mark.parametrize("distance", [50, 51])
def test_pages_of_different_nodes_are_merged_only_across_nodes(distance: int) -> None:
    """Pages of odd numbers lie on the second node, so the two of each content on one, or on both."""
    machine, ksmd = SimulatedMachine(), new_ksmd()
    ksmd.set("merge_across_nodes", 0)
    content = range(1, distance + 1)
    processes(machine, ksmd, [*content, *content], nodes=2)
    passes(ksmd, 2)
    counters = ksmd.counters()
    assert (counters.pages_sharing, counters.pages_unshared) == ((50, 0) if distance == 50 else (0, 102))
    ksmd.set("run", 2)
    ksmd.set("merge_across_nodes", 1)
    ksmd.set("run", 1)
    passes(ksmd, 3)
    assert ksmd.counters().pages_sharing == distance


def test_zero_pages_have_no_node() -> None:
    machine, ksmd = SimulatedMachine(), new_ksmd()
    ksmd.set("merge_across_nodes", 0)
    processes(machine, ksmd, [0] * 10, nodes=2)
    passes(ksmd, 2)
    assert ksmd.counters().ksm_zero_pages == 10


@pytest.mark.parametrize(("prune", "there"), [(2000, False), (100_000, True)])
def test_dead_segments_are_looked_for_as_often_as_the_knob_says(prune: int, there: bool) -> None:
    clock = Clock()
    machine, ksmd = SimulatedMachine(), new_ksmd(clock)
    ksmd.set("stable_node_chains_prune_millisecs", prune)
    content = range(1, 1001)
    (a, b), _ = processes(machine, ksmd, content, content, npages=1000)
    passes(ksmd, 2)
    for space in (a, b):
        space.write(BASE, *range(space.pid * 10_000, space.pid * 10_000 + 900))
    for _ in range(20):
        clock.now += 1
        passes(ksmd)
    assert (1 in machine.segments) == there


def test_full_scans_counts_a_pass_when_what_it_found_is_merged() -> None:
    """Who waits for two passes, as programs that know KSM do, finds everything merged."""
    machine, ksmd = SimulatedMachine(), new_ksmd()
    processes(machine, ksmd, SAME, SAME)
    while ksmd.counters().full_scans < 2:
        assert not machine.saved
        ksmd.do_scan()
    assert machine.saved == 50


def test_pages_to_scan_belongs_to_the_advisor_or_to_nobody() -> None:
    ksmd = new_ksmd()
    ksmd.set("pages_to_scan", 7)
    assert ksmd.get("advisor_mode") == "none"
    ksmd.set("advisor_mode", "scan-time")
    assert ksmd.get("pages_to_scan") == "500"
    with pytest.raises(OSError, match="Invalid argument"):
        ksmd.set("pages_to_scan", 7)


def test_without_advisor_a_batch_is_pages_to_scan_and_then_it_sleeps() -> None:
    ksmd = new_ksmd()
    ksmd.set("pages_to_scan", 7)
    ksmd.set("sleep_millisecs", 30)
    processes(SimulatedMachine(), ksmd, SAME)
    assert [ksmd.do_scan() for _ in range(8)] == [7] * 7 + [1]
    assert ksmd.next_wait() == 0.03


def test_stopped_or_alone_there_is_nothing_to_wait_for() -> None:
    ksmd = new_ksmd()
    assert ksmd.next_wait() == math.inf
    ksmd.enter(process(SimulatedMachine(), 1, SAME))
    assert ksmd.next_wait() == 0
    ksmd.set("run", 0)
    assert ksmd.next_wait() == math.inf
    assert ksmd.do_scan() == 0


@pytest.mark.parametrize("took", [0.0, 0.004, 0.05])
def test_new_memory_is_seen_and_merged_without_a_pause_but_the_one_between_two_passes(
    took: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of that, what the first pass takes is a part."""
    clock = Clock()
    ksmd = new_ksmd(clock)
    machine = SimulatedMachine()
    for space in processes(machine, ksmd, SAME, SAME)[0]:
        monkeypatch.setattr(space, "scan", functools.partial(slow, space.scan, clock, took))
    begun = clock.now
    while not machine.saved:
        clock.now += ksmd.next_wait()
        ksmd.do_scan()
    assert clock.now - begun == pytest.approx(max(0.02, 2 * took) + 2 * took)


def slow(scan: Callable[..., ScanResult], clock: Clock, seconds: float, *how: Any) -> ScanResult:
    clock.now += seconds
    return scan(*how)


def test_a_pass_does_not_end_before_a_forked_child_had_the_time_to_join() -> None:
    clock = Clock()
    ksmd = new_ksmd(clock)
    parent = process(SimulatedMachine(), 1, [1, 2, 3])
    ksmd.enter(parent)
    parent.forked = 0.05
    ksmd.do_scan()
    assert ksmd.next_wait() == pytest.approx(0.1)
    ksmd.do_scan()
    assert ksmd.counters().full_scans == 0
    clock.now += 0.06
    child = ksmd.enter(parent.fork(2))
    assert ksmd.next_wait() == 0
    ksmd.do_scan()
    assert (ksmd.counters().full_scans, child.passes) == (0, 1)
    assert ksmd.next_wait() == pytest.approx(0.04)
    parent.forked = 0.15
    clock.now += 0.05
    assert ksmd.next_wait() == 0
    passes(ksmd, 1)
    assert (ksmd.counters().full_scans, child.passes) == (1, 1)
    passes(ksmd, 1)


def test_who_joins_while_ksmd_idles_is_merged_at_once() -> None:
    clock = Clock()
    ksmd = new_ksmd(clock)
    machine = SimulatedMachine()
    processes(machine, ksmd, SAME)
    for _ in range(20):
        clock.now += ksmd.next_wait()
        ksmd.do_scan()
    assert ksmd.next_wait() == pytest.approx(IDLE_SECONDS)
    begun = clock.now
    ksmd.enter(process(machine, 300, SAME))
    while not machine.saved:
        clock.now += ksmd.next_wait()
        ksmd.do_scan()
    assert clock.now - begun < 0.1


def busy(advisor: Advisor, start: float, seconds: float, cpu: float) -> tuple[float, list[float]]:
    """Passes over memory that is written all the time, for so long: until when, and the pauses."""
    now, pauses = start, []
    while now < start + seconds:
        now += cpu
        advisor.scanned(now, cpu, hashed=1000, first_looks=0)
        advisor.pass_over(now, quiet=False)
        pauses.append(advisor.wait(now, urgent=False))
        now += pauses[-1]
    return now, pauses


def test_looking_again_costs_no_more_than_its_share_of_a_core() -> None:
    end, pauses = busy(Advisor(Knobs(advisor_max_cpu=5)), 0.0, 1000.0, 0.05)
    paid_by_the_application = 1000 * FAULT_SECONDS
    assert (0.05 + paid_by_the_application) * len(pauses) / end == pytest.approx(0.05, rel=0.1)


def test_a_pause_is_no_longer_than_memory_was_in_motion() -> None:
    advisor = Advisor(Knobs(advisor_max_cpu=1))
    now, pauses = busy(advisor, 100.0, 20.0, 1.0)
    assert pauses[0] == IDLE_SECONDS
    assert all(pause <= max(IDLE_SECONDS, now - 100.0) for pause in pauses)
    now, pauses = busy(advisor, now, 2000.0, 1.0)
    assert max(pauses) == LONGEST_SECONDS
    advisor.joined()
    assert busy(advisor, now, 0.5, 1.0)[1] == [IDLE_SECONDS]


def test_first_looks_are_not_held_against_it() -> None:
    advisor = Advisor(Knobs(advisor_max_cpu=5))
    advisor.scanned(10.0, cpu=0.02, hashed=1000, first_looks=1000)
    assert advisor.wait(10.0, urgent=False) == 0
    advisor.scanned(10.0, cpu=0.02, hashed=1000, first_looks=500)
    assert advisor.wait(10.0, urgent=False) == pytest.approx(0.2 + 500 * FAULT_SECONDS * 20)
    assert advisor.wait(10.0, urgent=True) == 0
    assert advisor.batch_pages() == BURST_PAGES


def test_what_was_merged_in_vain_is_held_against_it() -> None:
    advisor = Advisor(Knobs(advisor_max_cpu=2))
    advisor.scanned(10.0, cpu=0.001, hashed=0, first_looks=0, broken=1000)
    assert advisor.wait(10.0, urgent=False) == pytest.approx((0.001 + 1000 * BREAK_SECONDS) * 50)
    advisor = Advisor(Knobs(advisor_max_cpu=2))
    advisor.scanned(10.0, cpu=0.001, hashed=0, first_looks=0, broken=10**9)
    assert advisor.wait(10.0, urgent=False) <= 1.05 * IDLE_SECONDS


def test_a_process_that_writes_what_was_merged_is_looked_at_less() -> None:
    clock = Clock()
    ksmd = new_ksmd(clock)
    machine = SimulatedMachine()
    content = list(range(10, 1010))
    spaces = [process(machine, pid, content) for pid in (1, 2)]
    for space in spaces:
        ksmd.enter(space)
    for _ in range(20):
        clock.now += ksmd.next_wait()
        ksmd.do_scan()
    merged = sum(len(space.merged_pages()) for space in spaces)
    assert merged
    clock.now += IDLE_SECONDS
    for space in spaces:
        for vpn in space.pages():
            space.write(vpn, vpn + space.pid * 5000)
    ksmd.do_scan()
    assert ksmd.next_wait() > merged * BREAK_SECONDS / (Knobs().advisor_max_cpu / 100) * 0.9


def test_scan_time_sets_pages_to_scan_for_a_pass_to_take_its_time() -> None:
    knobs = Knobs(advisor_mode="scan-time", advisor_target_scan_time=10, advisor_max_cpu=100)
    advisor = Advisor(knobs)
    advisor.scanned(0.0, cpu=1.0, hashed=1_000_000, first_looks=0)
    advisor.pass_over(1.0, quiet=False)
    assert knobs.pages_to_scan == 2000  # 500 batches in ten seconds
    knobs.advisor_max_cpu = 1
    advisor.scanned(0.0, cpu=1.0, hashed=4_000_000, first_looks=0)
    advisor.pass_over(1.0, quiet=False)
    assert knobs.pages_to_scan == 800  # or else it would take four percent
    advisor.scanned(0.0, cpu=1.0, hashed=10, first_looks=0)
    advisor.pass_over(1.0, quiet=False)
    assert knobs.pages_to_scan == knobs.advisor_min_pages_to_scan


def test_status_and_joining_never_wait_for_a_batch() -> None:
    """While a batch goes on (its mutex is held), others still read, join and leave."""
    ksmd: Ksmd = new_ksmd()
    machine = SimulatedMachine()
    (a, _), (slot, _) = processes(machine, ksmd, SAME, SAME)
    passes(ksmd, 1)
    seen: list[int] = []

    def script(what: str, vpn: int) -> None:
        if not seen:
            other = threading.Thread(target=meanwhile)
            other.start()
            other.join(10)
            assert not other.is_alive()

    def meanwhile() -> None:
        seen.append(ksmd.counters().full_scans)
        assert len(ksmd.rows()) == 2
        ksmd.get("run")
        ksmd.next_wait()
        ksmd.enter(process(machine, 300, SAME))
        ksmd.exit(slot)

    a.script = script
    a.write(1000, 99)
    passes(ksmd, 3)
    assert seen == [1]
    assert slot.gone
    assert ksmd.counters().pages_sharing == 50
    assert [row.pid for row in ksmd.rows()] == [101, 300]


def test_processes_are_asked_at_the_same_time() -> None:
    """`concurrently` gets all of them at once, for scanning and for merging; then each of them twice, so that it has
    the next thing to do while what it said to the last is taken in."""
    widths: list[int] = []
    twice: list[bool] = []

    def concurrently(work, items):
        items = list(items)
        widths.append(len(set(items)))
        twice.append(len(items) == 2 * widths[-1])
        return map(work, items)

    ksmd = Ksmd(concurrently=concurrently)
    processes(SimulatedMachine(), ksmd, SAME, SAME, SAME)
    passes(ksmd, 2)
    assert max(widths) == 3
    assert widths.count(3) >= 3
    assert any(twice)


def test_copies_are_made_ahead_of_who_merges_with_them_but_not_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process has two at a time that the other has not tried; and neither waits until the other is through."""
    monkeypatch.setattr(exchange, "SEGMENT_PAGES", 8)
    monkeypatch.setattr(match, "SEGMENT_PAGES", 8)
    monkeypatch.setattr(budget, "SEGMENT_PAGES", 8)
    ksmd = new_ksmd()
    spaces, _ = processes(SimulatedMachine(), ksmd, range(1, 257), range(1, 257), npages=256)
    events: list[tuple[int, str]] = []
    for number, space in enumerate(spaces):
        for what in ("donate", "merge"):
            note = functools.partial(_noted, getattr(space, what), functools.partial(events.append, (number, what)))
            setattr(space, what, note)
    passes(ksmd, 2)
    assert ksmd.counters().pages_sharing == 256
    assert len(events) == 32 + 2 * 32
    untried = [0, 0]
    for number, what in events:
        untried[number] += what == "donate"
        untried[1 - number] -= what == "merge" and untried[1 - number] > 0
        assert max(untried) <= exchange.AHEAD
    halves = [sum(what == "donate" for _, what in part) for part in (events[:48], events[48:])]
    assert min(halves) >= 8


def _noted(do: Callable[..., Any], note: Callable[[], None], *arguments: Any) -> Any:
    note()
    return do(*arguments)


def test_small_batches_go_through_one_process_after_the_other() -> None:
    ksmd = new_ksmd()
    (a, b), _ = processes(SimulatedMachine(), ksmd, SAME, SAME)
    ksmd.do_scan(30)
    assert (a.pages_hashed, b.pages_hashed) == (30, 0)
    ksmd.do_scan(40)
    assert (a.pages_hashed, b.pages_hashed) == (50, 20)


def test_without_processes_there_are_no_passes() -> None:
    ksmd = new_ksmd()
    assert ksmd.do_scan() == 0
    assert ksmd.counters().full_scans == 0


def test_the_help_of_set_describes_every_knob(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["set", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for knob in KNOBS.values():
        assert f"{knob.name} {knob.range} (default: {knob.default})" in said
        assert knob.help in said
