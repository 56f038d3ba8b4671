"""What headroom() promises: never more than every limit above a process leaves, and not much less.

The files are made up: all that Linux 6.1 said in two nested cgroups of version 2, as captured; and, with the numbers
that a test is about put in, /proc/meminfo and v1's memory.stat as captured on Linux 6.18, and v2's memory.stat written
by its documentation. test_headroom_in_cgroups.py has real cgroups.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.agent.headroom import (
    CGROUP,
    MIB,
    UNLIMITED_V1,
    V1_MOUNT,
    V2_MOUNT,
    Look,
    Machine,
    Probe,
    look,
    machine,
    program,
)

__all__ = ["look", "machine", "program"]


@pytest.fixture
def captured(machine: Machine) -> Machine:
    """What a process in /outer/inner of a virtual machine read (Debian's 6.1 kernel, cgroup_no_v1=all).

    100 MiB are allowed to outer; 64 MiB, throttled from 60 MiB on, to inner, of which 4 MiB are protected. It has 8 MiB
    of page cache, 2 MiB of that dirty.
    """
    text = (Path(__file__).parent / "cgroup_files" / "linux-6.1-v2.txt").read_text()
    for part in text.split("== ")[1:]:
        path, _, content = part.partition("\n")
        machine.put(path, content)
        machine.put(path.replace("/self/", "/thread-self/"), content)
    for cgroup in ("outer", "outer/inner"):
        machine.put(f"{CGROUP}/{cgroup}/cgroup.procs", "")
    return machine


CLEAN = 8388608 + 8192 - 2097152
"""Bytes of page cache in the capture that can go: inactive_file + active_file - file_dirty."""


def test_on_captured_v2_files_the_throttle_of_the_own_cgroup_binds(captured: Machine, look: Look) -> None:
    assert look() == 62914560 - 12197888 + CLEAN


def test_on_captured_v2_files_without_it_the_limit_does(captured: Machine, look: Look) -> None:
    captured.put(f"{CGROUP}/outer/inner/memory.high", "max\n")
    assert look() == 67108864 - 12197888 + CLEAN


def test_on_captured_v2_files_an_ancestor_leaves_its_child_what_is_protected(captured: Machine, look: Look) -> None:
    captured.put(f"{CGROUP}/outer/memory.max", f"{40 * MIB}\n")
    all_of_it = 40 * MIB - 12095488 + CLEAN
    assert look() == all_of_it  # without its clean cache the child still has more than its 4 MiB
    captured.put(f"{CGROUP}/outer/inner/memory.min", f"{8 * MIB}\n")
    assert look() == all_of_it - (8 * MIB - (12197888 - CLEAN))


def test_without_limits_it_is_what_the_machine_has_available(look: Look) -> None:
    assert look() == 8 << 30


def test_a_limit_above_what_the_machine_has_does_not_matter(machine: Machine, look: Look) -> None:
    machine.v2(f"{CGROUP}/a", max=100 << 30, usage=1 << 30)
    assert look() == 8 << 30


def test_the_tightest_ancestor_binds(machine: Machine, look: Look) -> None:
    machine.v2(f"{CGROUP}/a/b", max=300 * MIB, usage=100 * MIB)
    assert look() == 200 * MIB
    machine.v2(f"{CGROUP}/a", max=400 * MIB, usage=350 * MIB)
    assert look() == 50 * MIB


def test_clean_file_cache_counts_but_not_what_has_to_be_written_first(machine: Machine, look: Look) -> None:
    stat = {"inactive_file": 40 * MIB, "active_file": 20 * MIB}
    machine.v2(f"{CGROUP}/a/b", max=300 * MIB, usage=290 * MIB, stat=stat)
    assert look() == 70 * MIB
    stat |= {"file_dirty": 8 * MIB, "file_writeback": 4 * MIB}
    machine.v2(f"{CGROUP}/a/b", max=300 * MIB, usage=290 * MIB, stat=stat)
    assert look() == 58 * MIB


def test_shared_memory_is_not_cache_that_can_go(machine: Machine, look: Look) -> None:
    stat = {"file": 200 * MIB, "shmem": 200 * MIB, "file_mapped": 200 * MIB, "inactive_anon": 200 * MIB}
    machine.v2(f"{CGROUP}/a/b", max=300 * MIB, usage=290 * MIB, stat=stat)
    assert look() == 10 * MIB


def test_usage_above_a_lowered_limit_is_paid_first(machine: Machine, look: Look) -> None:
    machine.v2(f"{CGROUP}/a/b", max=300 * MIB, usage=320 * MIB, stat={"inactive_file": 50 * MIB})
    assert look() == 30 * MIB
    machine.v2(f"{CGROUP}/a/b", max=300 * MIB, usage=320 * MIB)
    assert look() == 0


def test_memory_high_is_a_limit(machine: Machine, look: Look) -> None:
    machine.v2(f"{CGROUP}/a/b", max=300 * MIB, high=200 * MIB, usage=100 * MIB)
    assert look() == 100 * MIB


def test_cache_that_a_sibling_protects_does_not_count(machine: Machine, look: Look) -> None:
    cache = {"inactive_file": 60 * MIB}
    machine.v2(f"{CGROUP}/a", max=300 * MIB, usage=290 * MIB, stat=cache)
    machine.v2(f"{CGROUP}/a/sibling", usage=100 * MIB, stat=cache, min=70 * MIB)
    assert look() == (10 + 100 - 70) * MIB  # of its cache, as much can go as brings it down to its protection
    machine.v2(f"{CGROUP}/a/sibling", usage=100 * MIB, stat=cache, low=80 * MIB)
    assert look() == (10 + 100 - 80) * MIB
    machine.v2(f"{CGROUP}/a/sibling", usage=100 * MIB, stat=cache, min="max")
    assert look() == 10 * MIB


def test_a_cgroup_is_not_protected_from_its_own_limit(machine: Machine, look: Look) -> None:
    machine.v2(f"{CGROUP}/a/b", max=300 * MIB, usage=290 * MIB, stat={"inactive_file": 60 * MIB}, min=300 * MIB)
    assert look() == 70 * MIB


def test_cache_protected_from_the_machine_is_taken_off_what_it_has(machine: Machine, look: Look) -> None:
    machine.v2(f"{CGROUP}/other", usage=3 << 30, stat={"active_file": 2 << 30}, min=4 << 30)
    assert look() == 6 << 30


def test_a_cgroup_that_is_gone_leaves_its_ancestors(machine: Machine, look: Look) -> None:
    machine.v2(f"{CGROUP}/a", max=300 * MIB, usage=100 * MIB)
    machine.v2(f"{CGROUP}/a/b", max=MIB)  # made again since: not where the process's memory is charged
    machine.process("0::/a/b (deleted)\n", V2_MOUNT)
    assert look() == 200 * MIB


def test_ancestors_count_where_the_own_cgroup_has_no_memory_controller(machine: Machine, look: Look) -> None:
    machine.v2(f"{CGROUP}/a", max=300 * MIB, usage=100 * MIB)
    machine.process("0::/a/threaded/worker\n", V2_MOUNT)
    for cgroup in ("threaded", "threaded/worker"):
        machine.put(f"{CGROUP}/a/{cgroup}/cgroup.type", "threaded\n")
        machine.put(f"{CGROUP}/a/{cgroup}/cgroup.procs", "")
    assert look() == 200 * MIB


CONTAINER = "411 402 0:26 {root} /sys/fs/cgroup ro,nosuid,nodev,noexec,relatime master:11 - cgroup2 cgroup rw\n"


@pytest.mark.parametrize(
    ("root", "own", "seen"),
    [
        ("/docker/3f9c", "/docker/3f9c", ""),  # a container that sees the host's names
        ("/docker/3f9c", "/docker/3f9c/worker", "/worker"),
        ("/", "/", ""),  # in a cgroup namespace
        ("/", "/worker", "/worker"),
        ("/..", "/../peer", "/peer"),  # the process was moved out of the namespace
    ],
)
def test_a_container_sees_the_part_of_the_tree_that_is_mounted(
    machine: Machine, look: Look, root: str, own: str, seen: str
) -> None:
    machine.v2(f"{CGROUP}{seen}", max=300 * MIB, usage=100 * MIB)
    machine.process(f"0::{own}\n", CONTAINER.format(root=root))
    assert look() == 200 * MIB


@pytest.mark.parametrize(
    ("root", "own"),
    [
        ("/docker/3f9c", "/docker/3f9c0"),
        ("/docker/3f9c", "/docker"),
        ("/../peer", "/"),
        ("/", "/../peer"),
        ("/..", "/"),  # the mount starts above the namespace: nobody tells by which way it goes down
        ("/../..", "/worker"),
    ],
)
def test_where_no_mount_shows_its_own_cgroup_there_is_nothing(
    machine: Machine, look: Look, root: str, own: str
) -> None:
    machine.v2(CGROUP, max=MIB)
    machine.v2(f"{CGROUP}/peer", max=MIB)
    machine.v2(f"{CGROUP}0", max=MIB)
    machine.process(f"0::{own}\n", CONTAINER.format(root=root))
    assert (look(), look("unknown")) == (0, 1)


def test_the_mount_that_shows_most_is_used(machine: Machine, look: Look) -> None:
    bind = "50 27 0:26 /a/b /mnt/own\\040cgroup rw,relatime - cgroup2 cgroup2 rw\n"
    machine.v2("/mnt/own cgroup", max=300 * MIB, usage=100 * MIB)
    machine.process("0::/a/b\n", bind)
    assert look() == 200 * MIB
    machine.v2(f"{CGROUP}/a", max=300 * MIB, usage=200 * MIB)
    machine.process("0::/a/b\n", bind + V2_MOUNT)
    assert look() == 100 * MIB
    machine.process("0::/a/b\n", V2_MOUNT + bind)
    assert look() == 100 * MIB


def test_mountinfo_may_be_long_and_have_longer_lines(machine: Machine, look: Look) -> None:
    machine.v2(f"{CGROUP}/a", max=300 * MIB, usage=100 * MIB)
    layers = ":".join(f"/var/lib/docker/overlay2/l/{i:026X}" for i in range(1000))
    overlay = f"90 27 0:50 / /merged rw,relatime - overlay overlay rw,lowerdir={layers},workdir=/w\n"
    many = "".join(f"{i} 27 0:{i} / /mnt/{i} rw,relatime - tmpfs tmpfs rw,size=4k\n" for i in range(100, 1100))
    machine.process("0::/a/b\n", many + overlay + V2_MOUNT)
    assert look() == 200 * MIB


@pytest.mark.parametrize("cgroup", ["0::/a/b\n", "4:memory:/a/b\n0::/\n", "0::/\n"])
def test_a_memory_cgroup_that_is_named_and_nowhere_mounted_leaves_nothing(
    machine: Machine, look: Look, cgroup: str
) -> None:
    machine.process(cgroup, "")
    assert (look(), look("unknown")) == (0, 1)


def test_without_a_mount_the_root_of_the_hierarchy_is_known_to_have_no_limits(machine: Machine, look: Look) -> None:
    machine.process("0::/\n", "")
    link = machine.root / "proc/self/ns/cgroup"
    link.parent.mkdir()
    link.symlink_to("cgroup:[4026531835]")
    assert (look(), look("unknown")) == (8 << 30, 0)
    machine.process("0::/a\n", "")
    assert look() == 0
    machine.process("0::/\n", "")
    link.unlink()
    link.symlink_to("cgroup:[4026532000]")  # the root of a namespace may be any cgroup
    assert look() == 0


def test_a_kernel_without_cgroups_has_no_limits(machine: Machine, look: Look) -> None:
    machine.process("8:pids:/a\n", "")
    assert look() == 8 << 30
    machine.process("", "")
    assert look() == 8 << 30
    (machine.root / "proc/self/cgroup").unlink()
    assert look() == 8 << 30


def test_a_file_system_mounted_over_a_cgroup_hides_its_limits(machine: Machine, look: Look) -> None:
    machine.v2(f"{CGROUP}/a", max=300 * MIB)
    (machine.root / CGROUP[1:] / "a" / "b" / "cgroup.procs").unlink()  # some other directory
    assert (look(), look("unknown")) == (0, 1)
    shutil.rmtree(machine.root / CGROUP[1:] / "a" / "b")
    assert (look(), look("unknown")) == (0, 1)


@pytest.mark.parametrize(
    "file",
    [
        "/proc/self/cgroup",
        "/proc/thread-self/mountinfo",
        "/proc/meminfo",
        f"{CGROUP}/a/memory.max",
        f"{CGROUP}/a/memory.high",
        f"{CGROUP}/a/memory.low",
        f"{CGROUP}/a/memory.current",
        f"{CGROUP}/a/b/memory.stat",
        f"{CGROUP}/a/b/memory.max",
        f"{CGROUP}/a/sibling/memory.min",
        f"{CGROUP}/other/memory.min",
    ],
)
def test_a_file_that_cannot_be_read_is_no_permission(machine: Machine, look: Look, file: str) -> None:
    stat = {"inactive_file": 60 * MIB}
    for cgroup in ("a", "a/b", "a/sibling", "other"):
        machine.v2(f"{CGROUP}/{cgroup}", max=300 * MIB, usage=290 * MIB, stat=stat, min=MIB)
    assert look() > 0
    (machine.root / file[1:]).unlink()
    (machine.root / file[1:]).mkdir()  # it can be opened, and read(2) fails
    assert (look(), look("unknown")) == (0, 1)


def test_a_list_of_cgroups_that_is_too_long_leaves_nothing(machine: Machine, look: Look) -> None:
    machine.process("".join(f"{i}:name=x{i}:/{'x' * 4000}\n" for i in range(2, 7)) + "0::/a/b\n", V2_MOUNT)
    assert (look(), look("unknown")) == (0, 1)


def test_what_could_not_be_seen_is_looked_for_again_at_once_and_not_forgotten(program: Path, machine: Machine) -> None:
    machine.process("0::/a/b\n", "")
    probe = Probe([str(program), str(machine.root)])
    assert [probe.ask("look") for _ in range(3)] == [0, 0, 0]
    machine.process("0::/a/b\n", V2_MOUNT)
    assert probe.ask("look") == 8 << 30
    assert probe.ask("unknown") == 0
    assert probe.end() == 0


# ---- looks that are used again ----


def test_others_are_taken_to_take_ten_gibibytes_a_second_with_each_cpu(program: Path) -> None:
    probe = Probe([str(program)])
    assert abs(probe.ask("taken 1000000") - (10 << 30)) < MIB
    assert probe.end() == 0


def test_a_look_is_not_used_again_when_others_can_have_taken_half_of_it_since(program: Path, machine: Machine) -> None:
    probe = Probe([str(program), str(machine.root)])
    machine.meminfo(MemAvailable=128 * MIB)
    assert probe.ask(f"late 0 {MIB} {16 * MIB}") == 1
    machine.meminfo(MemAvailable=MIB)
    assert probe.ask(f"late 10 {MIB} {16 * MIB}") == 0  # ten milliseconds are 102 MiB for each CPU
    assert probe.end() == 0


def test_a_process_that_moves_is_followed_at_once(program: Path, machine: Machine) -> None:
    machine.v2(f"{CGROUP}/a/b", max=300 * MIB, usage=100 * MIB)
    machine.v2(f"{CGROUP}/c", max=100 * MIB, usage=70 * MIB)
    probe = Probe([str(program), str(machine.root)])
    assert probe.ask("look") == 200 * MIB
    machine.process("0::/c\n", V2_MOUNT)
    assert probe.ask("look") == 30 * MIB
    assert probe.end() == 0


# ---- swap ----


def test_swap_counts_only_when_asked(machine: Machine, look: Look) -> None:
    machine.meminfo(MemAvailable=1 << 30, SwapFree=2 << 30, anon=3 << 30)
    assert look() == 1 << 30
    assert look("swap") == 3 << 30
    machine.v2(f"{CGROUP}/a/b", max=300 * MIB, usage=290 * MIB, stat={"inactive_anon": 200 * MIB})
    assert look() == 10 * MIB
    assert look("swap") == 210 * MIB


def test_swap_takes_no_more_than_there_is_to_put_there(machine: Machine, look: Look) -> None:
    machine.meminfo(MemAvailable=1 << 30, SwapFree=2 << 30, anon=1 << 30)
    assert look("swap") == 2 << 30


def test_the_swap_of_every_ancestor_is_limited_too(machine: Machine, look: Look) -> None:
    anon = {"inactive_anon": 200 * MIB}
    machine.meminfo(MemAvailable=8 << 30, SwapFree=2 << 30, anon=3 << 30)
    machine.v2(f"{CGROUP}/a/b", max=300 * MIB, usage=290 * MIB, stat=anon)
    machine.v2(f"{CGROUP}/a", swap_max=100 * MIB, swap_current=30 * MIB)
    assert look("swap") == 80 * MIB
    machine.v2(f"{CGROUP}/a/b", max=300 * MIB, usage=290 * MIB, stat=anon, swap_max=0)
    assert look("swap") == 10 * MIB


def test_what_is_protected_is_not_swapped_for_an_ancestor(machine: Machine, look: Look) -> None:
    machine.meminfo(MemAvailable=8 << 30, SwapFree=2 << 30, anon=3 << 30)
    machine.v2(f"{CGROUP}/a", max=300 * MIB, usage=290 * MIB)
    machine.v2(f"{CGROUP}/a/b", stat={"inactive_anon": 200 * MIB})
    assert look("swap") == 210 * MIB
    machine.v2(f"{CGROUP}/a/b", stat={"inactive_anon": 200 * MIB}, min=MIB)
    assert look("swap") == 10 * MIB


def test_without_swappiness_a_cgroup_swaps_nothing(machine: Machine, look: Look) -> None:
    machine.meminfo(MemAvailable=8 << 30, SwapFree=2 << 30, anon=3 << 30)
    machine.v2(f"{CGROUP}/a/b", max=300 * MIB, usage=290 * MIB, stat={"inactive_anon": 200 * MIB})
    machine.put("/proc/sys/vm/swappiness", "0\n")
    assert look("swap") == 10 * MIB


# ---- v1 ----

V1_CGROUP = "9:name=systemd:/x\n4:{controllers}:/a/b\n1:cpu:/\n0::/c\n"
MEMORY = f"{CGROUP}/memory"


@pytest.fixture
def v1(machine: Machine) -> Machine:
    machine.process(V1_CGROUP.format(controllers="memory"), V2_MOUNT + V1_MOUNT)
    for path in ("", "/a", "/a/b"):
        machine.v1(MEMORY + path)
    return machine


def test_v1_without_limits_it_is_what_the_machine_has_available(v1: Machine, look: Look) -> None:
    assert look() == 8 << 30


def test_v1_counts_clean_cache_of_the_whole_subtree(v1: Machine, look: Look) -> None:
    stat = {"total_inactive_file": 40 * MIB, "total_active_file": 20 * MIB, "total_dirty": 8 * MIB}
    v1.v1(f"{MEMORY}/a", usage=290 * MIB, limit=300 * MIB, stat=stat | {"total_writeback": 2 * MIB})
    v1.v1(f"{MEMORY}/a/b", usage=100 * MIB, limit=300 * MIB)
    assert look() == 60 * MIB


def test_v1_in_a_hybrid_hierarchy_says_all_about_memory(v1: Machine, look: Look) -> None:
    v1.v2(f"{CGROUP}/c", max=MIB)
    v1.v1(f"{MEMORY}/a/b", usage=100 * MIB, limit=300 * MIB)
    assert look() == 200 * MIB


def test_v1_controllers_may_be_mounted_together(v1: Machine, look: Look) -> None:
    both = "35 31 0:32 / /sys/fs/cgroup/cpuset,memory rw,relatime - cgroup cgroup rw,cpuset,memory\n"
    v1.process(V1_CGROUP.format(controllers="cpuset,memory"), both)
    for path in ("", "/a/b"):
        v1.v1(f"{CGROUP}/cpuset,memory{path}")
    v1.v1(f"{CGROUP}/cpuset,memory/a", usage=100 * MIB, limit=300 * MIB)
    assert look() == 200 * MIB


def test_v1_memory_and_swap_together_have_a_limit_that_swap_does_not_relieve(v1: Machine, look: Look) -> None:
    v1.meminfo(MemAvailable=8 << 30, SwapFree=2 << 30, anon=3 << 30)
    stat = {"inactive_anon": 200 * MIB, "total_inactive_file": 5 * MIB}
    v1.v1(f"{MEMORY}/a/b", 290 * MIB, 300 * MIB, stat, memsw=(360 * MIB, 400 * MIB))
    assert look() == 15 * MIB
    assert look("swap") == 45 * MIB
    v1.v1(f"{MEMORY}/a/b", 290 * MIB, 300 * MIB, stat, memsw=(398 * MIB, 400 * MIB))
    assert look() == 7 * MIB
    v1.v1(f"{MEMORY}/a/b", 290 * MIB, UNLIMITED_V1, stat, memsw=(360 * MIB, 400 * MIB))
    assert look() == 45 * MIB
    v1.v1(f"{MEMORY}/a/b", 290 * MIB, 300 * MIB, stat, memsw=(360 * MIB, UNLIMITED_V1), swappiness=0)
    assert look("swap") == 15 * MIB


def test_v1_shows_an_exited_leader_in_the_root_so_the_thread_is_asked(v1: Machine, look: Look) -> None:
    v1.v1(f"{MEMORY}/a/b", usage=100 * MIB, limit=300 * MIB)
    v1.put("/proc/self/cgroup", "4:memory:/\n0::/c\n")
    assert look() == 200 * MIB


# ---- what cannot be read ----


def test_when_nothing_can_be_read_there_is_no_headroom(program: Path, tmp_path: Path) -> None:
    probe = Probe([str(program), str(tmp_path / "nothing")])
    assert probe.ask("look") == 0
    assert probe.end() == 0


def test_a_limit_with_unknown_usage_leaves_nothing(machine: Machine, look: Look) -> None:
    machine.v2(f"{CGROUP}/a/b", max=300 * MIB, usage=100 * MIB)
    (machine.root / "sys/fs/cgroup/a/b/memory.current").unlink()
    assert look() == 0


def test_a_limit_with_unknown_cache_leaves_what_is_not_used(machine: Machine, look: Look) -> None:
    machine.v2(f"{CGROUP}/a/b", max=300 * MIB, usage=100 * MIB, stat={"inactive_file": 60 * MIB})
    assert look() == 260 * MIB
    (machine.root / "sys/fs/cgroup/a/b/memory.stat").unlink()
    assert look() == 200 * MIB


def test_without_descriptors_there_is_no_headroom(program: Path, machine: Machine) -> None:
    probe = Probe([str(program), str(machine.root)])
    assert probe.ask("look") == 8 << 30
    assert probe.ask("descriptors 4") == 0  # enough for /proc/meminfo, not for a file in a cgroup's directory
    assert probe.ask("look") == 0
    assert probe.end() == 0
