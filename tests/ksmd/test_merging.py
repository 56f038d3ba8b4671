"""What is merged with what, how, and what is not."""

from __future__ import annotations

from itertools import pairwise

import pytest

from samepage.ksmd import Ksmd
from samepage.ksmd.stable import SEGMENT_PAGES
from samepage.memory import (
    PAGE_SIZE,
    AddressSpaceGone,
    PageStatus,
)
from samepage.memory.simulated import SimulatedAddressSpace
from samepage.memory.simulated_memory import SimulatedMachine
from tests.ksmd.simulation import BASE, SAME, check, new_ksmd, passes, process, processes


def test_equal_pages_of_two_processes_become_one_extent_each(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    (a, b), _ = processes(machine, ksmd, range(1, 201), range(1, 201))
    passes(ksmd, 2)
    assert machine.saved == 200
    assert (a.extents(), b.extents()) == (1, 1)
    counters = ksmd.counters()
    assert (counters.pages_shared, counters.pages_sharing, counters.bytes_saved) == (200, 200, 200 * PAGE_SIZE)


def test_a_page_must_stay_the_same_for_a_whole_pass(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    (a, b), _ = processes(machine, ksmd, [5], [5])
    for _ in range(4):
        passes(ksmd)
        a.write(BASE, a.read(BASE) + 1)
        b.write(BASE, b.read(BASE) + 1)
    assert ksmd.counters().pages_volatile == 2
    passes(ksmd)
    assert not a.merged_pages()
    passes(ksmd)
    assert a.merged_pages() == {BASE}


def test_without_tracking_pages_are_merged_just_the_same(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    processes(machine, ksmd, SAME, SAME, tracking=False)
    passes(ksmd, 2)
    assert machine.saved == 50


def test_a_process_that_comes_later_is_merged_with_what_is_there(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    processes(machine, ksmd, SAME, SAME)
    passes(ksmd, 2)
    late = process(machine, 300, SAME)
    ksmd.enter(late)
    passes(ksmd, 2)
    assert machine.saved == 100
    assert late.extents() == 1
    assert "donate" not in late.calls


def test_a_page_found_once_waits_in_the_unstable_index_for_its_equal(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    processes(machine, ksmd, SAME)
    passes(ksmd, 2)
    assert ksmd.counters().pages_unshared == 50
    ksmd.enter(process(machine, 300, SAME))
    passes(ksmd, 2)
    assert machine.saved == 50
    assert ksmd.counters().pages_unshared == 0


def test_what_is_written_while_in_the_unstable_index_is_not_found_there(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    (a,), _ = processes(machine, ksmd, SAME)
    passes(ksmd, 2)
    a.write(BASE, *range(1001, 1026))
    passes(ksmd, 1)
    ksmd.enter(process(machine, 300, SAME))
    passes(ksmd, 3)
    assert machine.saved == 25
    assert ksmd.counters().merge_failures == dict.fromkeys(ksmd.counters().merge_failures, 0)


def test_pages_of_zeros_become_the_zero_page_and_cost_no_mapping(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    (a,), _ = processes(machine, ksmd, [0] * 100, map_limit=1)
    passes(ksmd, 2)
    assert machine.used == 0
    assert machine.segments == {}
    assert a.map_count() == (1, 1)
    assert ksmd.counters().ksm_zero_pages == 100
    a.write(BASE + 3, 9)
    passes(ksmd)
    assert ksmd.counters().ksm_zero_pages == 99


def test_use_zero_pages_can_be_turned_off(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    ksmd.set("use_zero_pages", 0)
    processes(machine, ksmd, [0] * 100)
    passes(ksmd, 2)
    assert (ksmd.counters().ksm_zero_pages, ksmd.counters().pages_sharing) == (0, 99)


def test_a_node_is_shared_by_so_many_and_then_a_second_copy_is_made(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    ksmd.set("max_page_sharing", 10)
    (a,), (slot,) = processes(machine, ksmd, [7] * 95)
    passes(ksmd, 2)
    counters = ksmd.counters()
    assert (counters.pages_shared, counters.pages_sharing) == (10, 85)
    assert (counters.stable_node_chains, counters.stable_node_dups) == (1, 10)
    assert int(slot.domain.stable.sharers.max()) == 10
    assert a.extents() == 10  # the copies lie in a row, and stretches of ten pages map them in a row


def test_a_full_chain_takes_in_what_there_is_room_for(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    ksmd.set("max_page_sharing", 4)
    processes(machine, ksmd, [7] * 6)
    passes(ksmd, 2)
    assert ksmd.counters().pages_shared == 2
    for pid in range(300, 306):
        ksmd.enter(process(machine, pid, [7]))
        passes(ksmd, 2)
    assert (ksmd.counters().pages_shared, ksmd.counters().pages_sharing) == (3, 9)


def test_one_full_node_and_one_page_more_is_not_enough_for_a_copy(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    ksmd.set("max_page_sharing", 4)
    processes(machine, ksmd, [7] * 4, [9])
    passes(ksmd, 2)
    ksmd.enter(process(machine, 300, [7]))
    passes(ksmd, 2)
    assert ksmd.counters().pages_unshared == 2


def test_whoever_comes_after_a_node_is_full_is_matched_with_all_its_pages_at_once(
    machine: SimulatedMachine, ksmd: Ksmd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not page by page: for the 257th process with the same gigabyte that took minutes."""
    asked: list[int] = []
    monkeypatch.setattr("samepage.ksmd.match._share_out", lambda *args: asked.append(1))
    ksmd.set("max_page_sharing", 4)
    spaces = []
    for pid in range(1, 31):
        spaces.append(process(machine, pid, SAME))
        ksmd.enter(spaces[-1])
        passes(ksmd, 2)
    assert not asked
    copies = -(-30 // 4)
    assert machine.saved == (30 - copies) * len(SAME)
    assert ksmd.counters().stable_node_dups == copies * len(SAME)
    check(ksmd, machine, {})


def test_colliding_pages_are_refused_and_tried_again_but_rarely(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    spaces, _ = processes(machine, ksmd, range(1, 21), range(101, 121), hash_bits=2)
    passes(ksmd, 500)
    assert not spaces[0].merged_pages() | spaces[1].merged_pages()
    assert (ksmd.counters().pages_sharing, ksmd.counters().bytes_saved) == (0, 0)
    tries = sum(space.calls.count("merge") + space.calls.count("donate") for space in spaces)
    assert tries < 40 * 500 / 10  # a page in ten passes, on average


def test_pages_that_are_equal_are_merged_though_others_collide_with_them(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    """The first of a group of equal checksums is the only one of its content: the others do without it."""
    (a, b, c), _ = processes(machine, ksmd, [1], [2], [2], hash_bits=0)
    ksmd.set("use_zero_pages", 0)
    passes(ksmd, 2)
    assert not a.merged_pages()
    assert b.merged_pages() == c.merged_pages() == {BASE}
    assert ksmd.counters().pages_collided == 1


def test_a_collided_page_is_tried_again_once_it_has_changed(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    (a, b), _ = processes(machine, ksmd, [1], [3], hash_bits=1)
    assert a.checksum(1) == a.checksum(3) != a.checksum(2)
    ksmd.set("use_zero_pages", 0)
    passes(ksmd, 30)
    assert ksmd.counters().pages_collided > 0
    a.write(BASE, 2)
    b.write(BASE, 2)
    passes(ksmd, 2)
    assert machine.saved == 1


def test_a_write_between_the_hash_and_the_merge_is_never_lost(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    (a, b), _ = processes(machine, ksmd, SAME, SAME)
    for space in (a, b):

        def write(what: str, vpn: int, space: SimulatedAddressSpace = space) -> None:
            if what in ("donate", "merge") and vpn % 5 == 0:
                space.write(vpn, 1000 + vpn + space.pid)

        space.script = write
    passes(ksmd, 6)
    for space in (a, b):
        expected = {BASE + i: 1000 + BASE + i + space.pid if (BASE + i) % 5 == 0 else 1 + i for i in range(50)}
        assert space.pages() == expected
    assert machine.saved == ksmd.counters().pages_sharing - ksmd.counters().pages_dead == 40 - 10
    check(ksmd, machine, {})


def test_a_donor_that_is_busy_does_not_keep_the_others_from_merging(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    (a, b, c), _ = processes(machine, ksmd, SAME, SAME, SAME)
    a.script = lambda what, vpn: PageStatus.BUSY
    passes(ksmd, 2)
    assert not a.merged_pages()
    assert len(b.merged_pages()) == len(c.merged_pages()) == 50
    assert ksmd.rows()[0].pages_deferred == 50
    a.script = None
    passes(ksmd, 2)
    assert len(a.merged_pages()) == 50


def test_busy_pages_are_tried_after_one_pass_then_two_then_four(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    (a, b), _ = processes(machine, ksmd, [1], [1])
    a.script = b.script = lambda what, vpn: PageStatus.BUSY
    passes(ksmd, 2)
    tried = []
    for i in range(64):
        before = a.calls.count("donate") + b.calls.count("donate")
        passes(ksmd)
        if a.calls.count("donate") + b.calls.count("donate") > before:
            tried.append(i)
    waits = [after - before for before, after in pairwise(tried)]
    assert len(waits) >= 4
    assert waits == sorted(waits)
    assert waits[-1] > waits[0]


def test_without_memory_for_the_copies_nothing_is_donated_until_there_is(ksmd: Ksmd) -> None:
    machine = SimulatedMachine(limit=100)
    processes(machine, ksmd, SAME, SAME)
    passes(ksmd, 3)
    assert machine.saved == 0
    assert ksmd.counters().pages_deferred == 100
    machine.limit = 200
    passes(ksmd, 10)
    assert machine.saved == 50


def test_refused_pages_are_left_alone_until_they_change(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    (a, b), _ = processes(machine, ksmd, [1], [1])
    b.script = lambda what, vpn: PageStatus.REFUSED if what == "merge" else None
    passes(ksmd, 40)
    assert b.calls.count("merge") == 1
    b.script = None
    b.write(BASE, 2)
    a.write(BASE, 2)
    passes(ksmd, 2)
    assert b.merged_pages() == {BASE}


def test_the_longest_extents_come_first_when_mappings_are_short(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    content = [*range(1, 11), 500, *range(21, 61), 501, 71, 72, 502, *range(81, 101), 503]
    others = [*range(1, 11), 600, *range(21, 61), 601, 71, 72, 602, *range(81, 101), 603]
    (a, b), _ = processes(machine, ksmd, content, others, map_limit=5)
    passes(ksmd, 3)
    assert len(a.merged_pages()) == len(b.merged_pages()) == 40 + 20
    assert a.map_count()[0] <= 5
    assert ksmd.counters().pages_unmerged_vma == 2 * (10 + 2)
    a.map_limit = b.map_limit = 100
    passes(ksmd, 70)
    assert len(a.merged_pages()) == 72
    assert ksmd.counters().pages_unmerged_vma == 0


def test_nothing_is_donated_for_a_partner_that_cannot_afford_the_mapping(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    a, b = process(machine, 1, SAME), process(machine, 2, SAME, map_limit=1)
    ksmd.enter(a)
    ksmd.enter(b)
    passes(ksmd, 5)
    assert "donate" not in a.calls
    assert machine.used == 100


def test_nomap_counts_as_over_budget(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    (_, b), _ = processes(machine, ksmd, [1], [1])
    b.script = lambda what, vpn: PageStatus.NOMAP
    passes(ksmd, 2)
    assert ksmd.rows()[1].pages_unmerged_vma == 1
    assert ksmd.counters().merge_failures["NOMAP"] == 1


def test_domains_never_see_each_other(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    spaces = [process(machine, pid, SAME, domain=pid % 2) for pid in range(4)]
    slots = [ksmd.enter(space) for space in spaces]
    passes(ksmd, 3)
    assert machine.saved == 100
    by_domain = [{p.segment.ino for p in s._pages.values() if p.segment} for s in spaces]
    assert by_domain[0] == by_domain[2] != by_domain[1] == by_domain[3]
    assert slots[0].domain is slots[2].domain is not slots[1].domain


def test_one_domain_learns_nothing_of_another_by_what_it_is_asked(machine: SimulatedMachine) -> None:
    """The calls a process gets are the same whether or not its pages exist in another domain."""
    asked = []
    for other in (SAME, range(1000, 1050)):
        ksmd, machine = new_ksmd(), SimulatedMachine()
        mine = process(machine, 1, SAME, domain=1)
        ksmd.enter(mine)
        ksmd.enter(process(machine, 2, other, domain=2))
        passes(ksmd, 5)
        asked.append(mine.calls)
    assert asked[0] == asked[1]


def test_pages_that_came_by_fork_are_not_counted_as_saved(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    a, b = process(machine, 1, SAME), SimulatedAddressSpace(machine, 2)
    b.map_area(9000, 50)  # as addresses are random, who is elsewhere is no relative
    b.write(9000, *SAME)
    slot = ksmd.enter(a)
    ksmd.enter(b)
    passes(ksmd, 2)
    children = [a.fork(300), a.fork(301)]
    for child in children:
        ksmd.enter(child)
    passes(ksmd, 2)
    counters = ksmd.counters()
    assert (counters.pages_sharing, counters.pages_inherited) == (150, 100)
    assert counters.bytes_saved == 50 * PAGE_SIZE == machine.saved * PAGE_SIZE
    a.exit()
    passes(ksmd, 1)
    counters = ksmd.counters()
    assert slot.gone
    assert (counters.pages_sharing, counters.pages_inherited) == (100, 50)
    assert counters.bytes_saved == 50 * PAGE_SIZE == machine.saved * PAGE_SIZE
    b.exit()
    passes(ksmd, 1)
    assert ksmd.counters().bytes_saved == 0 == machine.saved


def test_pages_that_a_fork_shares_are_busy_and_merge_when_they_are_written_apart(
    machine: SimulatedMachine, ksmd: Ksmd
) -> None:
    (a,), _ = processes(machine, ksmd, SAME)
    child = a.fork(300)
    ksmd.enter(child)
    passes(ksmd, 3)
    assert machine.saved == 0
    assert ksmd.counters().pages_deferred > 0
    child.write(BASE, *SAME)
    passes(ksmd, 70)
    assert machine.saved == 50


def test_pages_that_moved_by_mremap_are_found_where_they_are(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    (a, _), _ = processes(machine, ksmd, SAME, SAME)
    passes(ksmd, 2)
    a.mremap(BASE, 50, 9000)
    passes(ksmd, 1)
    assert ksmd.counters().pages_sharing == 50
    assert ksmd.counters().bytes_saved == 50 * PAGE_SIZE


def test_segments_of_an_earlier_service_are_counted_but_never_merged_with(machine: SimulatedMachine) -> None:
    before, ksmd = new_ksmd(), new_ksmd()
    (a, b), slots = processes(machine, before, SAME, SAME)
    passes(before, 2)
    for slot in slots:
        before.exit(slot)
    a._seen_merged.clear()
    b._seen_merged.clear()
    b.write(BASE, 1000)
    late = process(machine, 300, SAME)
    for space in (a, late):
        ksmd.enter(space)
    b_slot = ksmd.enter(b)
    passes(ksmd, 3)
    assert not late.merged_pages()
    counters = ksmd.counters()
    assert counters.pages_shared == 50
    assert 0 <= counters.bytes_saved <= machine.saved * PAGE_SIZE
    assert ksmd.unmerge(b_slot).pages_unmerged == 49
    check(ksmd, machine, {})


def test_a_segment_is_closed_when_nobody_registered_maps_it(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    (a, b), slots = processes(machine, ksmd, SAME, SAME)
    passes(ksmd, 2)
    (segment,) = machine.segments.values()
    a.write(BASE, *range(1001, 1051))
    passes(ksmd)
    assert segment.is_open
    ksmd.exit(slots[1])
    assert not segment.is_open
    assert b.pages() == {BASE + i: 1 + i for i in range(50)}


def test_the_last_users_move_out_of_a_segment_that_is_mostly_dead(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    ksmd.set("stable_node_chains_prune_millisecs", 0)
    content = range(1, 1001)
    (a, b), _ = processes(machine, ksmd, content, content, npages=1000)
    passes(ksmd, 2)
    (old,) = machine.segments.values()
    for space in (a, b):
        space.write(BASE, *range(space.pid * 10_000, space.pid * 10_000 + 900))
    passes(ksmd, 1)
    assert ksmd.counters().pages_dead == 900
    assert ksmd.counters().bytes_saved < 0
    passes(ksmd, 20)
    assert old.ino not in machine.segments
    assert ksmd.counters().pages_dead == 0
    assert machine.saved == 100
    check(ksmd, machine, {})


def test_processes_with_much_in_common_donate_in_turn(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    content = range(1, 4 * SEGMENT_PAGES + 1)
    (a, b), _ = processes(machine, ksmd, content, content, npages=len(content))
    passes(ksmd, 2)
    assert machine.saved == len(content)
    assert (a.calls.count("donate"), b.calls.count("donate")) == (2, 2)


def test_extents_end_where_a_segment_ends(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    content = range(1, 2 * SEGMENT_PAGES + 101)
    (a, b), _ = processes(machine, ksmd, content, content, npages=len(content))
    passes(ksmd, 2)
    assert sorted(s.npages for s in machine.segments.values()) == [100, SEGMENT_PAGES, SEGMENT_PAGES]
    assert a.extents() == b.extents() == 3
    assert machine.saved == len(content)


def test_merge_range_does_not_wait_and_merges_within_one_process_too(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    (a,), (slot,) = processes(machine, ksmd, [1, 2, 3, 1, 2, 3, 0, 4])
    outcome = ksmd.merge_range(slot, BASE, 256)
    assert (outcome.pages_merged, outcome.pages_new) == (7, 7)
    assert machine.saved == 4
    assert ksmd.counters().pages_unshared == 1
    again = ksmd.merge_range(slot, BASE, 256)
    assert (again.pages_merged, again.pages_new) == (7, 0)
    assert set(outcome.failures.values()) == {0}
    assert len(a.merged_pages()) == 7


def test_merge_range_merges_that_range_only(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    (a,), (slot,) = processes(machine, ksmd, [1] * 100)
    ksmd.merge_range(slot, BASE + 10, 20)
    assert a.merged_pages() == set(range(BASE + 10, BASE + 30))


def test_merge_range_of_a_process_that_went_says_so(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    (a,), (slot,) = processes(machine, ksmd, [1] * 100)
    a.exit()
    with pytest.raises(AddressSpaceGone):
        ksmd.merge_range(slot, BASE, 100)
    assert ksmd.slots() == []


def test_what_was_unmerged_on_request_stays_so_until_it_is_written_or_asked_for(
    machine: SimulatedMachine, ksmd: Ksmd
) -> None:
    (a, _), (slot, _) = processes(machine, ksmd, SAME, SAME)
    passes(ksmd, 2)
    ksmd.unmerge(slot)
    passes(ksmd, 5)
    assert not a.merged_pages()
    assert ksmd.merge_range(slot, BASE, 50).pages_merged == 50


def test_a_process_that_dies_in_any_call_takes_nobody_with_it(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    for call in ("scan", "donate", "merge"):
        (a, b, c), slots = processes(machine, ksmd, SAME, SAME, SAME)

        def die(what: str, vpn: int, call: str = call, a: SimulatedAddressSpace = a) -> None:
            if what == call:
                a.exit()
                raise AddressSpaceGone("died")

        a.script = die
        passes(ksmd, 3)
        assert slots[0].gone
        assert len(b.merged_pages()) == len(c.merged_pages()) == 50
        check(ksmd, machine, {})
        for slot in slots:
            ksmd.exit(slot)
        machine.segments.clear()


def test_nothing_is_asked_a_page_when_nothing_changed(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    (a, b), _ = processes(machine, ksmd, SAME, range(1000, 1050))
    passes(ksmd, 3)
    a.calls.clear()
    hashed = a.pages_hashed
    passes(ksmd, 10)
    assert a.calls == ["scan"] * 10
    assert a.pages_hashed == hashed
    assert ksmd.counters().pages_skipped >= 10 * 100
    assert b.pages_hashed == 50
