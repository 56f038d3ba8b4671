"""Several processes are looked at at the same time."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

from samepage.ksmd import Ksmd
from samepage.ksmd.domain import Domain
from samepage.ksmd.look import Seen, ingest
from samepage.ksmd.mm_slot import MmSlot
from samepage.memory.simulated_memory import SimulatedMachine
from tests.ksmd.simulation import SAME, check, new_ksmd, passes, processes


def test_what_one_tells_is_taken_in_while_another_is_looked_at() -> None:
    with ThreadPoolExecutor(2) as pool:
        machine, ksmd = SimulatedMachine(), new_ksmd(concurrently=pool.map)
        spaces, (first, second) = processes(machine, ksmd, SAME, SAME)
        scan: Callable[..., Any] = spaces[1].scan
        known: list[int] = []

        def slow_scan(*args: Any) -> Any:
            deadline = time.monotonic() + 10
            while not first.known and time.monotonic() < deadline:
                time.sleep(0.001)
            known.append(first.known)
            return scan(*args)

        with mock.patch.object(spaces[1], "scan", slow_scan):
            ksmd.do_scan()
        assert known[0] == len(SAME) == second.known
        passes(ksmd, 3)
        assert ksmd.counters().pages_sharing == len(SAME)
        check(ksmd, machine, dict(zip((first, second), spaces, strict=True)))


def test_what_taking_in_costs_counts_in_whatever_thread_it_is_done() -> None:
    own, ticks = threading.get_ident(), itertools.count()

    def cpu_clock() -> float:
        return 0.0 if threading.get_ident() == own else float(next(ticks))

    with ThreadPoolExecutor(2) as pool:
        machine, ksmd = SimulatedMachine(), Ksmd(concurrently=pool.map, clock=lambda: 100.0, cpu_clock=cpu_clock)
        processes(machine, ksmd, SAME, SAME)
        ksmd.do_scan()
        assert ksmd.counters().cpu_seconds >= 2


def test_a_defect_in_taking_in_what_one_tells_leaves_the_others_alone() -> None:
    with ThreadPoolExecutor(2) as pool:
        machine, ksmd = SimulatedMachine(), new_ksmd(concurrently=pool.map)
        spaces, slots = processes(machine, ksmd, SAME, SAME, SAME)

        def defective(domain: Domain, slot: MmSlot, *seen: Any) -> Seen:
            if slot is slots[0]:
                raise ZeroDivisionError
            return ingest(domain, slot, *seen)

        with mock.patch("samepage.ksmd.passes.ingest", defective):
            ksmd.do_scan()
        assert ksmd.slots() == slots[1:]
        passes(ksmd, 3)
        assert ksmd.counters().pages_sharing == len(SAME)
        check(ksmd, machine, dict(zip(slots[1:], spaces[1:], strict=True)))
