"""What becomes of the mappings that a process may have, where equal pages lie elsewhere in the other."""

from __future__ import annotations

import numpy as np

from samepage.ksmd import Ksmd
from samepage.memory.simulated_memory import SimulatedMachine
from tests.ksmd.simulation import passes, processes


def test_scattered_pages_that_follow_one_another_take_a_mapping_each_and_not_two(
    machine: SimulatedMachine, ksmd: Ksmd
) -> None:
    content = list(range(1, 1001))
    others = np.random.default_rng(1).permutation(content).tolist()
    (a, b), _ = processes(machine, ksmd, content, others, npages=1000, map_limit=1050)
    passes(ksmd, 2)
    assert machine.saved == 1000
    assert max(a.mappings(), b.mappings()) <= 1050
    assert ksmd.counters().pages_unmerged_vma == 0


def test_of_more_scattered_pages_than_mappings_most_are_merged_and_neither_process_has_more_mappings_than_it_may(
    machine: SimulatedMachine, ksmd: Ksmd
) -> None:
    content = list(range(1, 2001))
    others = np.random.default_rng(1).permutation(content).tolist()
    (a, b), _ = processes(machine, ksmd, content, others, npages=2000, map_limit=800)
    passes(ksmd, 2)
    assert machine.saved > 600
    assert max(a.mappings(), b.mappings()) <= 800


def test_long_extents_come_before_a_stretch_of_short_ones_beside_them(machine: SimulatedMachine, ksmd: Ksmd) -> None:
    content = list(range(1, 401))
    others = content[:100] + np.random.default_rng(1).permutation(content[100:300]).tolist() + content[300:]
    (_, b), _ = processes(machine, ksmd, content, others, npages=400, map_limit=40)
    passes(ksmd, 2)
    assert machine.saved >= 200
    assert b.mappings() <= 40
