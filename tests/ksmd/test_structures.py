"""The arrays and indexes ksmd is built of."""

from __future__ import annotations

import time
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samepage.arrays import expand, run_starts
from samepage.ksmd.deferred import Deferred
from samepage.ksmd.index import ChecksumIndex, by_checksum
from samepage.ksmd.rmap import Columns, RmapItems, sorted_refs
from samepage.ksmd.stable import ADOPTED_NODES_MAX, SEGMENT_PAGES, SHARERS_MAX, StableTree
from samepage.memory.simulated_memory import SimulatedMachine


def u32(*numbers: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    return np.array(numbers, np.uint32)


def test_freed_rows_give_their_memory_back() -> None:
    rmap = RmapItems()
    base = rmap.allocate(1 << 18)
    rmap.state[base : base + (1 << 18)] = 7
    rmap.checksum[base : base + (1 << 18)] = 9
    assert rmap.resident() == (1 << 18) * 9
    rmap.free(base, 1 << 17)
    assert (1 << 17) * 9 <= rmap.resident() <= (1 << 17) * 9 + 16
    rmap.free(base + (1 << 17), 1 << 17)
    assert rmap.resident() == 0
    again = rmap.allocate(1 << 18)
    assert again == base
    assert not rmap.state[again : again + (1 << 18)].any()
    assert not rmap.checksum[again : again + (1 << 18)].any()


def test_rows_begin_where_they_are_asked_to() -> None:
    rmap = RmapItems()
    for rows, phase in ((7, 3), (1000, 517), (600, 511), (2000, 1)):
        assert rmap.allocate(rows, phase, 4096) % 4096 == phase
    assert rmap.allocate(1) == 0  # what was left free before them is used


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 1000)), min_size=1, max_size=60))
def test_many_short_ranges_are_disjoint_and_use_what_was_freed(steps: list[tuple[int, int]]) -> None:
    columns = Columns(np.uint8, rows=1 << 10)
    held: list[tuple[int, int]] = []
    most = 0
    for n, seed in steps:
        rng = np.random.default_rng(seed)
        lengths = rng.integers(1, 9, n)
        bases = columns.allocate_each(lengths)
        for base, length in zip(bases.tolist(), lengths.tolist(), strict=True):
            assert not columns.columns[0][base : base + length].any()
            columns.columns[0][base : base + length] += 1
            held.append((base, length))
        assert sorted(held) == sorted(set(held))
        assert columns.columns[0].sum() == sum(length for _, length in held)
        most = max(most, sum(length for _, length in held))
        gone = rng.random(len(held)) < 0.5
        freed = np.array([h for h, g in zip(held, gone, strict=True) if g], np.int64).reshape(-1, 2)
        columns.free(freed[:, 0], freed[:, 1])
        held = [h for h, g in zip(held, gone, strict=True) if not g]
        assert columns.columns[0].sum() == sum(length for _, length in held)
        first, last = columns.free_ranges()
        assert (first < last).all()
        assert (first[1:] > last[:-1]).all()
    assert columns.top <= 2 * most + 400


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5000)), max_size=40))
def test_ranges_are_disjoint_zero_and_used_again(steps: list[tuple[bool, int]]) -> None:
    columns = Columns(np.uint64, np.uint8, rows=1 << 12)
    held: list[tuple[int, int]] = []
    for take, n in steps:
        if take or not held:
            base = columns.allocate(n)
            assert all(base + n <= b or b + m <= base for b, m in held)
            rows = np.arange(base, base + n)
            assert not columns.columns[0][rows].any()
            assert not columns.columns[1][rows].any()
            columns.columns[0][rows] = 255
            columns.columns[1][rows] = 255
            held.append((base, n))
        else:
            base, size = held.pop(n % len(held))
            part = min(n, size)
            columns.free(base, part)
            if part < size:
                held.append((base + part, size - part))
        for b, m in held:
            assert (columns.columns[0][b : b + m] == 255).all()
    for b, m in held:
        columns.free(b, m)
    assert columns.resident() == 0


def test_short_free_ranges_do_not_make_it_slow_to_find_longer_ones() -> None:
    rows = Columns(np.uint8)
    bases = [rows.allocate(15) for _ in range(40_000)]
    for base in bases[::2]:
        rows.free(base, 15)
    started = time.process_time()
    longer = [rows.allocate(31) for _ in range(20_000)]
    assert time.process_time() - started < 2  # looking at all that is free each time: more than 20
    for base in longer:
        rows.free(base, 31)
    assert [rows.allocate(31) for _ in range(20_000)] == longer
    assert {rows.allocate(15) for _ in range(20_000)} == set(bases[::2])


@given(st.lists(st.integers(0, 9), max_size=60), st.sampled_from([1, 4, 16, 1 << 16]), st.data())
def test_an_index_finds_what_a_dictionary_would(sums: list[int], lately: int, data: st.DataObject) -> None:
    """With few entries in the small array and few gaps in the large one, or many."""
    with mock.patch("samepage.ksmd.index.LATELY", lately):
        _index_as_a_dictionary(sums, data)


def _index_as_a_dictionary(sums: list[int], data: st.DataObject) -> None:
    keys = np.array([*sums, 0], np.uint64)
    index = ChecksumIndex(lambda: keys)
    present: set[int] = set()
    for _ in range(6):
        add = data.draw(st.sets(st.sampled_from(range(len(sums)))) if sums else st.just(set()))
        new = sorted(add - present)
        present |= add
        held = [sums[n] for n in present]
        assert index.insert(u32(*new)) == any(held.count(sums[n]) > 1 for n in new)
        drop = data.draw(st.sets(st.sampled_from(range(len(sums)))) if sums else st.just(set()))
        assert set(index.remove(u32(*drop)).tolist()) == present & drop
        present -= drop
        assert index.in_order()
        assert index.numbers().tolist() == sorted(present)
        assert len(index) == len(present)
        wanted = np.arange(11, dtype=np.uint64)
        expected = [[n for n in sorted(present) if sums[n] == key] for key in range(11)]
        assert index.find(wanted).tolist() == [e[0] if e else -1 for e in expected]
        assert index.count(wanted).tolist() == [len(e) for e in expected]
        assert [index.find(wanted[i : i + 1])[0] for i in range(11)] == [e[0] if e else -1 for e in expected]
        assert [n.tolist() for n in index.all(wanted)] == [
            [key for key, e in enumerate(expected) for _ in e],
            [n for e in expected for n in e],
        ]


def test_a_change_of_a_large_index_copies_nothing_of_it() -> None:
    keys = np.random.default_rng(1).permutation(1 << 18).astype(np.uint64)
    index = ChecksumIndex(lambda: keys)
    index.insert(np.arange(1 << 17, dtype=np.uint32))
    large = index._large.entries
    for start in range(0, 1 << 15, 512):
        index.remove(np.arange(start, start + 512, dtype=np.uint32))
        index.insert(np.arange((1 << 17) + start, (1 << 17) + start + 512, dtype=np.uint32))
    assert index._large.entries is large
    assert index.in_order()
    assert index.numbers().tolist() == list(range(1 << 15, (1 << 17) + (1 << 15)))


CHECKSUMS = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.tuples(st.integers(0, 2), st.integers(0, 9)).map(lambda parts: parts[0] << 62 | parts[1]),
)
"""Some of which differ in the lower half alone."""


@given(st.lists(CHECKSUMS, max_size=60))
def test_checksums_are_sorted_as_by_a_stable_sort(sums: list[int]) -> None:
    order, in_order = by_checksum(np.array(sums + sums[::2], np.uint64))
    assert in_order.tolist() == sorted(sums + sums[::2])
    assert order.tolist() == sorted(range(len(order)), key=lambda i: (sums + sums[::2])[i])


def test_runs_and_refs() -> None:
    assert expand(np.array([5, 20]), np.array([3, 2])).tolist() == [5, 6, 7, 20, 21]
    assert run_starts(u32(1, 2, 3, 7, 8), u32(4, 5, 9, 10, 11)).tolist() == [0, 2, 3]
    assert sorted_refs([u32(5, 3), u32(3, 1)]).tolist() == [1, 3, 5]


def test_chains_are_checksums_with_several_nodes() -> None:
    machine, tree = SimulatedMachine(), StableTree()
    segment = tree.add(machine.new_segment([1, 1, 1, 2]), np.array([5, 5, 5, 6], np.uint64), 0)
    nodes = u32(*range(segment.base, segment.base + 4))
    tree.publish(nodes[[0, 3]])
    assert (tree.chains, tree.dups) == (0, 0)
    tree.publish(nodes[1:3])
    assert (tree.chains, tree.dups) == (1, 3)
    tree.unpublish(nodes[:1])
    assert (tree.chains, tree.dups) == (1, 2)
    tree.unpublish(nodes[1:2])
    assert (tree.chains, tree.dups) == (0, 0)


def test_a_segment_lives_as_long_as_it_has_sharers() -> None:
    machine, tree = SimulatedMachine(), StableTree()
    handle = machine.new_segment([1, 2, 3])
    segment = tree.add(handle, np.array([1, 2, 3], np.uint64), 0)
    first = segment.base
    tree.attach(np.array([first, first, first + 2]))
    assert (tree.pages_shared, tree.sharers_total, tree.dead_nodes) == (2, 3, 1)
    tree.detach(np.array([first, first]))
    assert (tree.pages_shared, tree.sharers_total, tree.dead_nodes) == (1, 1, 2)
    tree.detach(np.array([first + 2]))
    assert not handle.is_open
    assert (tree.segments, tree.dead_nodes, machine.used) == ([], 0, 0)


def test_adopted_segments_are_bounded() -> None:
    tree = StableTree()
    assert tree.found(1, SEGMENT_PAGES, 1, 0) is None
    for ino in range(ADOPTED_NODES_MAX // SEGMENT_PAGES):
        assert tree.found(ino, 0, 1, 0) is not None
    assert tree.found(1 << 40, 0, 1, 0) is None


def test_more_sharers_than_fit_into_a_byte_are_counted_right() -> None:
    machine, tree = SimulatedMachine(), StableTree()
    segment = tree.add(machine.new_segment([1, 2, 3]), np.array([1, 2, 3], np.uint64), 0)
    nodes = np.arange(segment.base, segment.base + 3)
    bytes_before = tree.nbytes()
    for _ in range(255):
        tree.attach(nodes[:2])
    assert tree.sharers.dtype == np.uint8
    tree.attach(nodes[2:])
    assert tree.sharers.dtype == np.uint8
    tree.attach(np.array([nodes[0], nodes[2], nodes[0]]))  # a node named twice
    assert tree.sharers[nodes].tolist() == [257, 255, 2]
    assert tree.checksum[nodes].tolist() == [1, 2, 3]
    assert tree.sharers_total == 514
    assert tree.nbytes() > bytes_before
    another = tree.add(machine.new_segment([4] * 20000), np.full(20000, 4, np.uint64), 0)  # the columns grow
    assert tree.sharers[nodes].tolist() == [257, 255, 2]
    assert not tree.sharers[another.base : another.base + 20000].any()
    for _ in range(2):
        tree.detach(nodes[[0, 2]])
    for _ in range(255):
        tree.detach(nodes[:2])
    assert segment not in tree.segments
    assert tree.sharers_total == 0


def test_sharers_never_overflow() -> None:
    tree = StableTree()
    segment = tree.found(1, 0, 2, 0)
    assert segment is not None
    tree.attach(np.full(SHARERS_MAX - 1, segment.base))
    assert tree.has_room(np.array([segment.base, segment.base + 1])).tolist() == [True, True]
    assert tree.has_room(np.array([segment.base, segment.base])).tolist() == [False, False]


def test_what_is_deferred_again_waits_twice_as_long() -> None:
    deferred, waits, since = Deferred(), [], 0
    deferred.defer(u32(7), 0)
    for passes in range(1, 200):
        if deferred.due(passes):
            waits.append(passes - since)
            since = passes
            deferred.defer(u32(7), passes)
    assert waits == [1, 2, 4, 8, 16, 32, 64, 64]


def test_nodes_published_in_any_order_stand_in_the_index_in_theirs() -> None:
    """A new segment lies where there is room, which may be before one that is older."""
    machine, stable = SimulatedMachine(), StableTree()
    sums = np.full(4, 7, np.uint64)
    for _ in range(2):
        segment = stable.add(machine.new_segment([1, 2, 3, 4]), sums, 0)
        nodes = np.arange(segment.base, segment.base + 4)
        stable.attach(nodes)
        stable.publish(nodes[::-1].astype(np.uint32))
    assert stable.index.all(sums[:1])[1].tolist() == list(range(8))
    assert list(stable.problems()) == []


def test_columns_for_which_there_is_no_memory_stay_as_they_are() -> None:
    columns = Columns(np.uint64, np.uint8)
    base = columns.allocate(100)
    columns.columns[0][base] = 5
    with pytest.raises(MemoryError):
        columns.allocate(1 << 33)
    view = columns.columns[0]  # with which the mapping cannot be resized
    with pytest.raises(BufferError):
        columns.allocate(1 << 17)
    del view
    assert columns.columns[0][base] == 5
