"""The commit guard: what writing everything at once would take is shown, and `max_overcommit` bounds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.memory_cgroup import MemoryCgroup
from benchmarks.oom import rows, samepage, wait_merged
from benchmarks.processes import wait_until
from samepage.ksmd import Ksmd
from samepage.memory import PAGE_SIZE
from samepage.memory.simulated_memory import SimulatedMachine
from samepage.process.merge_domain import MergeDomain
from samepage.service.control import Client
from tests.ksmd.simulation import new_ksmd, passes, process, processes
from tests.oom.conftest import MIB, Start, needs_agent

CONTENT = range(1, 101)


def merged(ksmd: Ksmd) -> int:
    return sum(row.merged for row in ksmd.rows())


def test_without_the_knob_more_is_merged_than_there_is_memory_for() -> None:
    machine, ksmd = SimulatedMachine(limit=310), new_ksmd()
    processes(machine, ksmd, CONTENT, CONTENT)
    passes(ksmd, 3)
    assert merged(ksmd) == 200
    assert sum(row.bytes_needed for row in ksmd.rows()) == 200 * PAGE_SIZE


def test_no_page_is_merged_beyond_max_overcommit() -> None:
    for percent in (50, 100, 150):
        machine, ksmd = SimulatedMachine(limit=300), new_ksmd()
        processes(machine, ksmd, CONTENT, CONTENT)
        ksmd.set("max_overcommit", percent)
        for _ in range(80):
            passes(ksmd)
            available = machine.limit - machine.used
            assert merged(ksmd) * 100 <= available * percent
        assert merged(ksmd) > 0


def test_pages_of_zeros_count_too() -> None:
    machine, ksmd = SimulatedMachine(limit=260), new_ksmd()
    ksmd.enter(process(machine, 1, [0] * 200))
    ksmd.set("max_overcommit", 100)
    passes(ksmd, 70)
    assert 0 < merged(ksmd) <= machine.limit - machine.used


def test_a_group_with_memory_enough_is_not_held_back_by_another() -> None:
    full, roomy = SimulatedMachine(limit=200, name="/full"), SimulatedMachine(name="/roomy")
    ksmd = new_ksmd()
    ksmd.set("max_overcommit", 100)
    for number, machine in enumerate((full, full, roomy, roomy)):
        space = process(machine, number, CONTENT)
        space.domain = MergeDomain(number // 2)
        ksmd.enter(space)
    passes(ksmd, 5)
    by_pid = {row.pid: row.merged for row in ksmd.rows()}
    assert (by_pid[2], by_pid[3]) == (100, 100)
    assert by_pid[0] + by_pid[1] == 0


def test_off_by_default_and_off_again() -> None:
    machine, ksmd = SimulatedMachine(limit=299), new_ksmd()
    assert ksmd.get("max_overcommit") == "0"
    ksmd.set("max_overcommit", 1)
    processes(machine, ksmd, CONTENT, CONTENT)
    passes(ksmd, 5)
    assert merged(ksmd) == 0
    ksmd.set("max_overcommit", 0)
    passes(ksmd, 70)
    assert merged(ksmd) == 200


def status(socket: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(samepage(socket, "status", "--json").stdout)
    return found


@needs_agent
def test_status_shows_what_is_needed_and_available(start: Start, socket: str, group: MemoryCgroup) -> None:
    workers = [start(64, 16), start(64, 16)]
    for worker in workers:
        worker.ask("advise")
    wait_merged(socket, workers)
    samepage(socket, "set", "run", "0")
    group.set_limit(200 * MIB)
    found = status(socket)
    name = f"/{group.path.name}"
    (row,) = [row for row in found["cgroups"] if row["cgroup"] == name]
    assert row["processes"] == 2
    assert row["bytes_needed"] == sum(p["merged"] for p in found["processes"]) * PAGE_SIZE > 120 * MIB
    assert abs(row["bytes_available"] - (200 * MIB - group.usage())) < 16 * MIB
    for process_row in found["processes"]:
        assert process_row["cgroup"] == name
        assert process_row["bytes_needed"] == process_row["merged"] * PAGE_SIZE
        assert process_row["bytes_available"] == row["bytes_available"] or process_row["bytes_available"] > 0
    assert name in samepage(socket, "status").stdout


@needs_agent
def test_with_max_overcommit_what_is_merged_can_always_be_unmerged(
    start: Start, socket: str, group: MemoryCgroup, tmp_path: Path
) -> None:
    samepage(socket, "set", "max_overcommit", "80")
    group.set_limit(240 * MIB)
    workers = [start(96, 16), start(96, 16)]
    for worker in workers:
        worker.ask("advise")
    wait_until(lambda: sum(row["merged"] for row in rows(socket).values()) * PAGE_SIZE > 20 * MIB, "merged", 60)
    with Client(socket) as client:
        scans = client.ask("status")["counters"]["full_scans"]
        wait_until(lambda: client.ask("status")["counters"]["full_scans"] > scans + 5, "scanned", 60)
    (row,) = [row for row in status(socket)["cgroups"] if row["cgroup"] == f"/{group.path.name}"]
    assert row["bytes_needed"] <= row["bytes_available"] * 0.85
    assert samepage(socket, "unmerge").returncode == 0
    assert all(worker.ask("verify") for worker in workers)
    assert group.killed() == 0
