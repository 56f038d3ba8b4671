"""What the kernel merged is unmerged without the OOM killer, where the kernel's own way wakes it."""

from __future__ import annotations

import json
import os

import pytest

from benchmarks import kernel_ksm, memory_cgroup, oom_kernel
from benchmarks.memory_cgroup import MemoryCgroup
from benchmarks.oom import MIB, ROOMY, merged_by_the_kernel, show
from benchmarks.processes import wait_until
from samepage import inject
from samepage.kernel.attach import attach
from samepage.kernel.rows import processes
from samepage.kernel.target import TargetError
from tests.kernel.conftest import StartHolder, mergeable, mergeable_mappings, needs_ksm, samepage
from tests.oom.conftest import group

__all__ = ["group"]

pytestmark = needs_ksm
needs_cgroups = pytest.mark.skipif(memory_cgroup.version() is None, reason="needs the memory controller")

ROUNDS = int(os.environ.get("SAMEPAGE_TEST_UNMERGES", "12"))
KERNEL_ROUNDS = int(os.environ.get("SAMEPAGE_TEST_KERNEL_UNMERGES", "1"))


@needs_cgroups
@pytest.mark.timeout(120 + 10 * ROUNDS)
def test_in_a_cgroup_that_is_too_small_it_is_enomem_and_nobody_is_killed() -> None:
    out = oom_kernel.under_a_limit(ROUNDS, oom_kernel.by_the_command)
    show(out)
    assert oom_kernel.is_good(out), out


def test_what_the_command_says_and_that_the_rest_stays_mergeable(group: MemoryCgroup) -> None:
    with merged_by_the_kernel(group) as (workers, neighbours):
        answer = oom_kernel.by_the_command(workers[0])
        (row,) = answer["processes"]
        assert (answer["status"], answer["errno"]) == (1, "ENOMEM")
        assert f"{row['pages_remaining']} remain merged" in answer["said"]
        neighbours.end()
        group.set_limit(ROOMY)
        answer = oom_kernel.by_the_command(workers[0])
        assert (answer["status"], answer["said"]) == (0, "")
        assert mergeable_mappings(workers[0].pid)


def test_detach_in_a_cgroup_that_is_too_small_leaves_the_rest_mergeable_and_goes_on_later(group: MemoryCgroup) -> None:
    with merged_by_the_kernel(group) as (workers, neighbours):
        worker = workers[0]
        done = samepage("detach", str(worker.pid))
        assert done.returncode == 1
        assert "remain merged: the rest needs" in done.stderr
        assert mergeable_mappings(worker.pid)
        neighbours.end()
        group.set_limit(ROOMY)
        assert samepage("detach", str(worker.pid)).returncode == 0
        assert not mergeable_mappings(worker.pid)
        assert worker.ask("verify")
        assert mergeable_mappings(workers[1].pid)
        assert group.killed() == 0


@needs_cgroups
@pytest.mark.timeout(60 + 60 * KERNEL_ROUNDS)
def test_the_kernels_own_run_2_kills_in_the_same_cgroup() -> None:
    out, deadly = oom_kernel.by_the_kernel(KERNEL_ROUNDS)
    show(out)
    assert deadly == KERNEL_ROUNDS


def test_a_look_at_another_process_sees_its_cgroup(group: MemoryCgroup, start: StartHolder) -> None:
    holder = start(1)
    far, unseen = inject.headroom(holder.pid)
    assert not unseen
    group.set_limit(64 * MIB)
    (group.path / "cgroup.procs").write_text(str(holder.pid))
    near, unseen = inject.headroom(holder.pid)
    assert not unseen
    assert near <= 64 * MIB < far


def test_a_process_in_a_full_cgroup_is_left_alone(group: MemoryCgroup, start: StartHolder) -> None:
    """To hold it may take a page of its stack, for which the OOM killer would wake."""
    holder = start(16)
    (group.path / "cgroup.procs").write_text(str(holder.pid))
    assert holder.ask("write") == "0\n"
    group.set_limit(group.usage() + (128 << 10))
    with pytest.raises(TargetError, match="its memory cgroup is full"):
        attach(holder.pid)
    assert not mergeable(holder.pid)
    group.set_limit(ROOMY)
    attach(holder.pid)
    assert (group.killed(), mergeable(holder.pid), holder.intact()) == (0, True, True)


def test_with_memory_enough_all_is_unmerged_and_stays_mergeable(start: StartHolder) -> None:
    with kernel_ksm.borrowed(run=0, **kernel_ksm.FASTEST):
        holders = [start() for _ in range(2)]
        assert samepage("attach", *(str(holder.pid) for holder in holders)).returncode == 0
        wait_until(lambda: all(holder.merged() >= 0.99 * holder.pages for holder in holders), "merged", 60)
        kernel_ksm.write("run", 0)
        assert {holder.pid for holder in holders} <= set(processes())
        # By number: without, it is for all processes of the machine.
        pids = [argument for holder in holders for argument in ("--pid", str(holder.pid))]
        done = samepage("unmerge", "--engine", "kernel", "--json", *pids)
        assert done.returncode == 0
        answer = json.loads(done.stdout)
        assert answer["pages_unmerged"] >= sum(holder.pages for holder in holders) * 0.99
        assert all(mergeable_mappings(holder.pid) and holder.intact() for holder in holders)
        assert samepage("detach", *(str(holder.pid) for holder in holders)).returncode == 0
