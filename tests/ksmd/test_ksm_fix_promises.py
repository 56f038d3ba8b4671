"""The promises of the patch "ksm: fix endless loop on oom", one test or more for each.

S1..S7 are the numbers they have in docs/architecture.md. S4 and S5 are kept by several parts together; here is what
ksmd has to do for them.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from samepage.ksmd import UnmergeFailed
from samepage.ksmd.mm_slot import BREAK_FEW
from samepage.memory import PAGE_SIZE, AddressSpaceGone, BreakResult
from samepage.memory.simulated import SimulatedAddressSpace
from samepage.memory.simulated_memory import SimulatedMachine
from tests.ksmd.simulation import BASE, new_ksmd, passes, process, processes

SAME = range(1, 51)


def fail_break(space: SimulatedAddressSpace, at: int, code: int, times: int = 1 << 30) -> None:
    """Breaking page `at` fails with an errno, so many times."""
    left = [times]

    def script(what: str, vpn: int) -> int | None:
        if what == "break" and vpn == at and left[0]:
            left[0] -= 1
            return code
        return None

    space.script = script


def never() -> bool:
    return False


def after(calls: int) -> Callable[[], bool]:
    """Somebody who cancels at the question after so many."""
    asked = iter(range(1 << 30))
    return lambda: next(asked) >= calls


def test_s1_a_break_that_backs_out_is_taken_again_until_it_is_done() -> None:
    machine, ksmd = SimulatedMachine(), new_ksmd()
    (a, _), (slot, _) = processes(machine, ksmd, SAME, SAME)
    passes(ksmd, 2)
    fail_break(a, BASE + 7, errno.EAGAIN, times=5)
    result = ksmd.unmerge(slot)
    assert (result.errno, result.pages_unmerged, result.pages_remaining) == (0, 50, 0)
    assert a.faults == 50 + 5


def test_s1_a_break_ends_on_out_of_memory_and_says_so() -> None:
    machine, ksmd = SimulatedMachine(), new_ksmd()
    (a, _), (slot, _) = processes(machine, ksmd, SAME, SAME)
    passes(ksmd, 2)
    machine.limit = machine.used + 20
    result = ksmd.unmerge(slot)
    assert (result.errno, result.pages_unmerged, result.pages_remaining) == (errno.ENOMEM, 20, 30)
    assert result.bytes_needed == 30 * PAGE_SIZE
    assert result.bytes_available == 0
    assert len(a.merged_pages()) == 30
    assert a.calls.count("break") == 1


def test_s1_a_page_that_cannot_be_mapped_any_more_does_not_stop_the_others_and_is_not_said_to_be_unmerged() -> None:
    """EFAULT is the kernel's SIGBUS."""
    machine, ksmd = SimulatedMachine(), new_ksmd()
    (a, _), (slot, _) = processes(machine, ksmd, SAME, SAME)
    passes(ksmd, 2)
    fail_break(a, BASE + 7, errno.EFAULT)
    result = ksmd.unmerge(slot)
    assert (result.errno, result.pages_unmerged, result.pages_remaining) == (errno.EFAULT, 49, 1)
    assert a.merged_pages() == {BASE + 7}
    again = ksmd.unmerge(slot)
    assert (again.errno, again.pages_unmerged, again.pages_remaining) == (errno.EFAULT, 0, 1), "it was forgotten"
    with pytest.raises(UnmergeFailed):
        ksmd.set("run", 2)
    assert slot.merged == len(a.merged_pages()) == 1


def test_s1_where_no_page_can_be_mapped_all_are_still_merged_and_each_unmerge_says_so() -> None:
    """As before Linux 5.14, had the agent no other way than MADV_POPULATE_WRITE."""
    machine, ksmd = SimulatedMachine(), new_ksmd()
    pages = 5000
    (a, _), (slot, _) = processes(machine, ksmd, range(1, pages + 1), range(1, pages + 1), npages=pages)
    passes(ksmd, 2)
    a.script = lambda what, vpn: errno.EFAULT if what == "break" else None
    for _ in range(2):
        a.calls.clear()
        result = ksmd.unmerge(slot)
        assert (result.errno, result.pages_unmerged, result.pages_remaining) == (errno.EFAULT, 0, pages)
        assert (slot.gone, slot.merged, len(a.merged_pages())) == (False, pages, pages)
        assert a.calls.count("break") < pages, "it was asked for every single page"
    a.script = None
    passes(ksmd, 2)
    assert not a.merged_pages(), "it was not tried again by later passes"


def test_s6_unmerging_all_fails_as_long_as_there_are_pages_that_cannot_be() -> None:
    machine, ksmd = SimulatedMachine(), new_ksmd()
    (a, _), (slot, _) = processes(machine, ksmd, SAME, SAME)
    passes(ksmd, 2)
    a.script = lambda what, vpn: errno.EFAULT if what == "break" else None
    for _ in range(2):
        with pytest.raises(UnmergeFailed):
            ksmd.set("run", 2)
        assert (ksmd.get("run"), slot.merged) == ("0", len(SAME))
    a.script = None
    ksmd.set("run", 2)
    assert not a.merged_pages()


def test_s1_an_area_that_goes_away_during_a_break_is_no_error() -> None:
    machine, ksmd = SimulatedMachine(), new_ksmd()
    (a, _), (slot, _) = processes(machine, ksmd, SAME, SAME)
    passes(ksmd, 2)

    def unmap(what: str, vpn: int) -> int | None:
        if what == "break":
            a.unmap(BASE, 256)
            return errno.EFAULT
        return None

    a.script = unmap
    result = ksmd.unmerge(slot)
    assert (result.errno, result.pages_remaining) == (0, 0)
    assert ksmd.counters().pages_sharing == 0


def test_s2_an_unmerge_can_be_cancelled_between_steps_and_goes_on_when_called_again() -> None:
    machine, ksmd = SimulatedMachine(), new_ksmd()
    content = range(1, 6001)
    (a, _), (slot, _) = processes(machine, ksmd, content, content, npages=6000)
    passes(ksmd, 2)
    result = ksmd.unmerge(slot, cancelled=after(1))
    assert (result.errno, result.pages_unmerged, result.pages_remaining) == (errno.EINTR, BREAK_FEW, 6000 - BREAK_FEW)
    assert len(a.merged_pages()) == 6000 - BREAK_FEW
    again = ksmd.unmerge(slot, cancelled=never)
    assert (again.errno, again.pages_unmerged, again.pages_remaining) == (0, 6000 - BREAK_FEW, 0)
    assert not a.merged_pages()


@pytest.mark.parametrize("why", [errno.EINTR, errno.ENOMEM, errno.EFAULT, 0])
def test_s2_what_a_process_was_asked_for_ahead_of_an_error_is_known_of_too(why: int) -> None:
    lock = threading.Lock()

    class OneAtATime(SimulatedAddressSpace):
        """As an agent is."""

        def break_ksm(self, vpn: int, npages: int) -> BreakResult:
            with lock:
                return super().break_ksm(vpn, npages)

    content = range(1, 20001)  # some thirteen ranges
    with ThreadPoolExecutor(4) as pool:
        machine, ksmd = SimulatedMachine(), new_ksmd(concurrently=pool.map)
        spaces = [OneAtATime(machine, pid) for pid in (1, 2)]
        for space in spaces:
            space.map_area(BASE, len(content))
            space.write(BASE, *content)
        slot, _ = (ksmd.enter(space) for space in spaces)
        a = spaces[0]
        passes(ksmd, 2)
        assert len(a.merged_pages()) == len(content)
        if why in (errno.ENOMEM, errno.EFAULT):
            fail_break(a, BASE + 5000, why, times=1)
        result = ksmd.unmerge(slot, cancelled=after(3) if why == errno.EINTR else never)
        assert result.errno == (why if why != errno.EFAULT else 0)
        assert result.pages_unmerged + result.pages_remaining == len(content)
        assert len(a.merged_pages()) == result.pages_remaining == slot.merged
        if result.errno:
            assert BREAK_FEW < result.pages_unmerged < len(content)
        assert ksmd.unmerge(slot).errno == 0
        assert not a.merged_pages()
        assert slot.merged == 0


def test_s2_an_unmerge_stops_at_the_first_error_and_what_was_done_stays_done() -> None:
    machine, ksmd = SimulatedMachine(), new_ksmd()
    (a, b), _ = processes(machine, ksmd, SAME, SAME)
    passes(ksmd, 2)
    fail_break(a, BASE + 30, errno.ENOMEM)
    result = ksmd.unmerge()
    assert result.errno == errno.ENOMEM
    assert [(p.pid, p.pages_unmerged, p.pages_remaining) for p in result.processes] == [(a.pid, 30, 20)]
    assert len(a.merged_pages()) == 20
    assert len(b.merged_pages()) == 50
    a.script = None
    result = ksmd.unmerge()
    assert (result.errno, result.pages_unmerged) == (0, 70)


def test_s3_processes_join_and_leave_while_everything_is_unmerged() -> None:
    machine, ksmd = SimulatedMachine(), new_ksmd()
    spaces, slots = processes(machine, ksmd, SAME, SAME, SAME)
    passes(ksmd, 2)
    late: list[SimulatedAddressSpace] = []

    def join_and_leave(what: str, vpn: int) -> int | None:
        if what == "break" and not late:
            ksmd.exit(slots[0])  # the one it is at
            ksmd.exit(slots[1])  # the next one
            late.append(spaces[2].fork(200))  # brings merged pages along
            ksmd.enter(late[0])
        return None

    spaces[0].script = join_and_leave
    ksmd.set("run", 2)
    assert not spaces[2].merged_pages()
    assert not late[0].merged_pages()
    assert len(spaces[1].merged_pages()) == 50  # not ours any more
    assert [row.pid for row in ksmd.rows()] == [spaces[2].pid, 200]
    assert ksmd.counters().full_scans == 0


def test_s3_success_sets_full_scans_to_zero_and_failure_does_not() -> None:
    machine, ksmd = SimulatedMachine(), new_ksmd()
    (a, _), _ = processes(machine, ksmd, SAME, SAME)
    passes(ksmd, 3)
    fail_break(a, BASE + 30, errno.ENOMEM, times=1)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        ksmd.set("run", 2)
    assert ksmd.counters().full_scans == 3
    ksmd.set("run", 2)
    counters = ksmd.counters()
    assert counters.full_scans == 0
    assert (counters.pages_shared, counters.pages_sharing, counters.pages_unshared, counters.pages_volatile) == (0,) * 4


@pytest.mark.parametrize("fails", [True, False])
def test_s3_the_cursor_goes_back_to_the_head_either_way(fails: bool) -> None:
    machine, ksmd = SimulatedMachine(), new_ksmd()
    (a, _), _ = processes(machine, ksmd, range(1, 51), [*range(101, 150), 50], tracking=False)
    passes(ksmd, 3)
    assert len(a.merged_pages()) == 1
    hashed = a.pages_hashed
    ksmd.do_scan(20)
    assert a.pages_hashed == hashed + 20  # in the middle
    if fails:
        fail_break(a, BASE + 49, errno.ENOMEM)
        with pytest.raises(UnmergeFailed):
            ksmd.set("run", 2)
    else:
        ksmd.set("run", 2)
    ksmd.set("run", 1)
    hashed = a.pages_hashed
    passes(ksmd)
    assert a.pages_hashed == hashed + (49 if fails else 50)


def test_s4_entering_gives_back_what_really_went_wrong() -> None:
    """ksmd adds no error of its own to that of the address space."""

    class Broken(SimulatedAddressSpace):
        @property
        def zero_checksum(self) -> int:
            raise AddressSpaceGone("died at the door")

    ksmd = new_ksmd()
    with pytest.raises(AddressSpaceGone) as caught:
        ksmd.enter(Broken(SimulatedMachine(), 1))
    assert caught.value.errno == errno.ESRCH
    assert ksmd.slots() == []


def test_s5_after_a_failed_unmerge_the_pages_are_still_known_to_be_merged() -> None:
    """Only so can its area stay registered until the last of them is unmerged."""
    machine, ksmd = SimulatedMachine(), new_ksmd()
    (a, _), (slot, _) = processes(machine, ksmd, SAME, SAME)
    passes(ksmd, 2)
    fail_break(a, BASE + 10, errno.ENOMEM)
    result = ksmd.unmerge(slot, BASE, 20)
    assert (result.errno, result.pages_remaining) == (errno.ENOMEM, 10)
    assert ksmd.rows()[0].merged == 40
    assert len(a.merged_pages()) == 40


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EINTR])
def test_s6_a_failed_write_of_2_to_run_sets_run_to_0_and_returns_the_error(code: int) -> None:
    machine, ksmd = SimulatedMachine(), new_ksmd()
    (a, _), _ = processes(machine, ksmd, SAME, SAME)
    passes(ksmd, 2)
    fail_break(a, BASE + 30, code)
    with pytest.raises(UnmergeFailed) as caught:
        ksmd.set("run", "2")
    assert caught.value.errno == code
    assert caught.value.result.pages_unmerged == 30
    assert ksmd.get("run") == "0"
    assert ksmd.do_scan() == 0


def test_s6_writing_2_again_goes_on_where_it_failed() -> None:
    machine, ksmd = SimulatedMachine(), new_ksmd()
    (a, b), _ = processes(machine, ksmd, SAME, SAME)
    passes(ksmd, 2)
    machine.limit = machine.used + 60
    with pytest.raises(UnmergeFailed):
        ksmd.set("run", 2)
    assert machine.used == machine.limit
    machine.limit += 1000
    ksmd.set("run", 2)
    assert ksmd.get("run") == "2"
    assert not a.merged_pages() | b.merged_pages()
    assert machine.used == machine.unmerged
    assert machine.segments == {}
    ksmd.set("run", 1)
    passes(ksmd, 2)
    assert machine.saved == 50


def test_s6_everything_is_looked_at_afresh_after_2_though_nothing_was_written() -> None:
    machine, ksmd = SimulatedMachine(), new_ksmd()
    processes(machine, ksmd, SAME, SAME)
    passes(ksmd, 2)
    saved = machine.saved
    ksmd.set("run", 2)
    late = process(machine, 300, SAME)
    ksmd.enter(late)
    ksmd.set("run", 1)
    passes(ksmd, 2)
    assert machine.saved == saved + 50


def test_s7_a_break_that_failed_is_tried_again_by_later_passes_ever_more_rarely() -> None:
    machine, ksmd = SimulatedMachine(), new_ksmd()
    (a, _), (slot, _) = processes(machine, ksmd, SAME, SAME)
    passes(ksmd, 2)
    fail_break(a, BASE + 10, errno.ENOMEM)
    assert ksmd.unmerge(slot, BASE, 20).errno == errno.ENOMEM
    tries = a.calls.count("break")
    passes(ksmd, 100)
    assert 3 <= a.calls.count("break") - tries <= 8
    a.script = None
    passes(ksmd, 70)
    assert len(a.merged_pages()) == 30
    assert slot.pending_breaks == []
    tries = a.calls.count("break")
    passes(ksmd, 70)
    assert a.calls.count("break") == tries


def test_s7_a_cancelled_unmerge_is_not_taken_up_by_later_passes() -> None:
    machine, ksmd = SimulatedMachine(), new_ksmd()
    (a, _), (slot, _) = processes(machine, ksmd, SAME, SAME)
    passes(ksmd, 2)
    assert ksmd.unmerge(slot, cancelled=after(0)).errno == errno.EINTR
    passes(ksmd, 70)
    assert "break" not in a.calls
