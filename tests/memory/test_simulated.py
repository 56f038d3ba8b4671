"""The simulation keeps its own promises, or the tests that stand on it prove nothing."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from samepage.memory import AREA, EXTENT, ZERO_PAGE, AddressSpace, AddressSpaceGone, PageStatus, RunKind
from samepage.memory.simulated import SimulatedAddressSpace
from samepage.memory.simulated_memory import OutOfMemory, SimulatedMachine


def space_with(*contents: int, limit: int = 1000, **how: int) -> SimulatedAddressSpace:
    space = SimulatedAddressSpace(SimulatedMachine(limit=limit), 1, **how)
    space.map_area(10, 100)
    space.write(10, *contents)
    return space


def merge_all(space: SimulatedAddressSpace, n: int) -> list[int]:
    donation = space.donate(np.array([(10, n)], AREA))
    return list(space.merge(donation.segment, np.array([(10, n, 0)], EXTENT)).status)


def kinds(space: SimulatedAddressSpace) -> list[tuple[int, int, int]]:
    return [(int(r["vpn"]), int(r["npages"]), int(r["kind"])) for r in space.scan(0, 1000).runs]


def test_it_is_an_address_space() -> None:
    space: AddressSpace = space_with()
    assert space.areas().ranges.tolist() == [(10, 100)]


def test_only_pages_written_since_the_last_look_are_hashed() -> None:
    space = space_with(1, 2, 3)
    assert kinds(space) == [(10, 3, RunKind.HASHED)]
    assert kinds(space) == []
    space.write(11, 2)
    assert kinds(space) == [(11, 1, RunKind.HASHED)]
    space.tracking = False
    assert kinds(space) == [(10, 3, RunKind.HASHED)]


def test_a_scan_goes_on_where_it_stopped() -> None:
    space = space_with(1, 2, 3)
    first = space.scan(0, 2)
    assert (len(first.checksums), first.next_vpn) == (2, 12)
    assert space.scan(12, 2).next_vpn == 0


def test_merged_pages_are_reported_broken_or_gone_once() -> None:
    space = space_with(1, 2, 3)
    assert merge_all(space, 3) == [PageStatus.DONE] * 3
    assert kinds(space) == []
    space.rehash_broken = False
    space.write(10, 7)
    space.discard(12)
    assert kinds(space) == [(10, 1, RunKind.BROKEN), (12, 1, RunKind.GONE)]
    assert kinds(space) == []
    assert space.pages() == {10: 7, 11: 2}


def test_what_is_written_where_a_merged_page_is_gone_is_hashed_in_the_same_look() -> None:
    space = space_with(1, 2, 3)
    merge_all(space, 3)
    space.discard(10, 3)
    space.write(11, 7)
    gone = [(10, 2, RunKind.GONE), (11, 1, RunKind.HASHED), (12, 1, RunKind.GONE)]
    assert kinds(space) == gone
    assert kinds(space) == []


def test_pages_that_moved_are_hashed_no_more_once_broken() -> None:
    space = space_with(1)
    space.rehash_broken = False
    merge_all(space, 1)
    space.write(10, 7)
    assert kinds(space) == [(10, 1, RunKind.BROKEN)]
    assert kinds(space) == []
    assert merge_all(space, 1) == [PageStatus.REFUSED]


def test_a_forked_child_shares_everything_and_finds_what_was_merged() -> None:
    space = space_with(1, 2)
    donation = space.donate(np.array([(10, 1)], AREA))
    space.merge(donation.segment, np.array([(10, 1, 0)], EXTENT))
    child = space.fork(2)
    assert kinds(child) == [(10, 1, RunKind.FOUND), (11, 1, RunKind.HASHED)]
    assert space.machine.used == space.machine.unmerged == 2
    assert child.donate(np.array([(11, 1)], AREA)).status.tolist() == [PageStatus.BUSY]
    child.write(10, 5, 6)
    assert (space.machine.used, space.machine.unmerged) == (4, 4)
    assert space.pages() == {10: 1, 11: 2}


def test_memory_is_what_is_in_use_and_segments_are_freed_by_the_last() -> None:
    space = space_with(1, 2, 3)
    donation = space.donate(np.array([(10, 3)], AREA))
    assert space.machine.used == 6
    space.merge(donation.segment, np.array([(10, 3, 0)], EXTENT))
    assert (space.machine.used, space.machine.saved) == (3, 0)
    assert donation.segment is not None
    donation.segment.close()
    space.write(10, 9, 9)
    assert space.machine.used == 5
    space.discard(10, 3)
    assert (space.machine.used, space.machine.unmerged, space.machine.segments) == (0, 0, {})


def test_different_bytes_are_refused_and_zero_pages_need_no_segment() -> None:
    space = space_with(0, 5)
    result = space.merge(None, np.array([(10, 2, ZERO_PAGE)], EXTENT))
    assert result.status.tolist() == [PageStatus.DONE, PageStatus.DIFFERENT]
    assert space.machine.used == 1
    assert space.read(10) == 0


def test_ksmd_is_told_there_is_no_memory_and_only_the_application_runs_out() -> None:
    space = space_with(1, 2, 3, limit=5)
    donation = space.donate(np.array([(10, 3)], AREA))
    assert donation.status.tolist() == [PageStatus.DONE, PageStatus.DONE, PageStatus.NOMEM]
    space.merge(donation.segment, np.array([(10, 2, 0)], EXTENT))
    space.write(50, 1, 1)
    result = space.break_ksm(10, 3)
    assert (result.errno, result.pages_unmerged, result.pages_remaining) == (errno.ENOMEM, 0, 2)
    with pytest.raises(OutOfMemory):
        space.write(60, 1)


def test_the_reserve_is_left_alone() -> None:
    space = space_with(1, 2, limit=10)
    space.machine.reserve = 7
    assert space.donate(np.array([(10, 2)], AREA)).status.tolist() == [PageStatus.DONE, PageStatus.NOMEM]


def test_scripts_race_with_calls_and_make_them_fail() -> None:
    space = space_with(1, 2)

    def script(what: str, vpn: int) -> int | None:
        if what == "merge":
            space.write(10, 8)
            return PageStatus.BUSY if vpn == 11 else None
        return None

    space.script = script
    assert merge_all(space, 2) == [PageStatus.DIFFERENT, PageStatus.BUSY]
    space.exit()
    with pytest.raises(AddressSpaceGone):
        space.scan(0, 1)


def test_few_bits_make_checksums_collide() -> None:
    space = space_with(hash_bits=1)
    assert {space.checksum(i) for i in range(50)} == {0, 1}


def test_a_moved_page_is_gone_here_and_found_there() -> None:
    space = space_with(1, 2)
    merge_all(space, 2)
    space.mremap(10, 2, 500)
    assert kinds(space) == [(500, 2, RunKind.FOUND)]
    assert space.read(501) == 2
    assert [tuple(a) for a in space.areas().ranges.tolist()] == [(12, 98), (500, 2)]


def test_mappings_are_counted_by_extent() -> None:
    space = space_with(1, 2, 3)
    assert space.map_count()[0] == 1
    donation = space.donate(np.array([(10, 3)], AREA))
    space.merge(donation.segment, np.array([(10, 3, 0)], EXTENT))
    assert space.map_count()[0] == 2  # the extent, and the rest of the area
    space.write(11, 9)
    assert space.map_count()[0] == 4
