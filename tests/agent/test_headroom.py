"""What headroom() promises: never more than every limit above a process leaves, and not much less.

The first part feeds it file trees: all that Linux 6.1 said in two nested cgroups of version 2, as captured; and, with
the numbers that a test is about put in, /proc/meminfo and v1's memory.stat as captured on Linux 6.18, and v2's
memory.stat written by its documentation. The second makes real memory cgroups of version 1, and fills them.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.agent.preload import SOURCES

MIB = 1 << 20
UNLIMITED_V1 = 0x7FFFFFFFFFFFF000
# Per CPU, 64 pages that are charged and not used, and 64 pages' worth of updates that memory.stat lacks; twice
# for before and after, and some for the probe's own pages and page tables.
SLACK = 2 * 2 * 64 * 4096 * (os.cpu_count() or 1) + MIB


class Probe:
    """A running headroom_probe; see there for the verbs."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def answer(self) -> int:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the probe ended with {self.process.wait()}"
        return int(line)

    def ask(self, command: str) -> int:
        self.tell(command)
        return self.answer()

    def end(self) -> int:
        """Ends the probe; its exit status, -SIGKILL when it was killed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        return self.process.wait()


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("headroom") / "probe"
    flags = ["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}", "-pthread"]
    subprocess.run(["gcc", *flags, str(Path(__file__).with_name("headroom_probe.c")), "-o", str(target)], check=True)
    return target


# ---- files -----------------------------------------------------------------------------------------------------------

PROC = "22 27 0:21 / /proc rw,relatime - proc proc rw\n"
V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"
MEMORY_STAT_V1 = (Path(__file__).parent / "cgroup_files" / "memory.stat.v1").read_text()
MEMORY_STAT_V2 = (Path(__file__).parent / "cgroup_files" / "memory.stat.v2").read_text()
MEMINFO = (Path(__file__).parent / "cgroup_files" / "meminfo").read_text()


def edit(text: str, values: Mapping[str, int]) -> str:
    """A file of `key value` lines with other values."""
    for key, value in values.items():
        text, found = re.subn(rf"^({re.escape(key)}\s+)\d+", rf"\g<1>{value}", text, flags=re.MULTILINE)
        assert found == 1, key
    return text


class Machine:
    """The files of a machine, below a directory. Sizes are in bytes, as in the kernel's files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.meminfo(MemAvailable=8 << 30)
        self.put("/proc/sys/vm/swappiness", "60\n")

    def put(self, path: str, text: str) -> None:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def meminfo(self, **values: int) -> None:
        keys = {"anon": "Active(anon)"}
        text = edit(MEMINFO, {f"{keys.get(key, key)}:": value >> 10 for key, value in values.items()})
        self.put("/proc/meminfo", text)

    def process(self, cgroup: str, mountinfo: str) -> None:
        self.put("/proc/self/cgroup", cgroup)
        self.put("/proc/thread-self/cgroup", cgroup)
        self.put("/proc/thread-self/mountinfo", PROC + mountinfo)

    def v2(self, path: str, usage: int = 0, stat: Mapping[str, int] | None = None, **limits: int | str) -> None:
        """One cgroup. limits: max, high, min, low, swap_max, swap_current."""
        values: dict[str, int | str] = {"max": "max", "high": "max", "min": 0, "low": 0, "swap_max": "max"}
        self.put(f"{path}/cgroup.procs", "")
        for key, value in (values | {"current": usage, "swap_current": 0} | limits).items():
            self.put(f"{path}/memory.{key.replace('_', '.')}", f"{value}\n")
        self.put(f"{path}/memory.stat", edit(MEMORY_STAT_V2, stat or {}))

    def v1(
        self,
        path: str,
        usage: int = 0,
        limit: int = UNLIMITED_V1,
        stat: Mapping[str, int] | None = None,
        memsw: tuple[int, int] | None = None,
        swappiness: int = 60,
    ) -> None:
        """One cgroup. memsw: (usage, limit) of memory and swap together."""
        self.put(f"{path}/cgroup.procs", "")
        self.put(f"{path}/memory.usage_in_bytes", f"{usage}\n")
        self.put(f"{path}/memory.limit_in_bytes", f"{limit}\n")
        self.put(f"{path}/memory.swappiness", f"{swappiness}\n")
        self.put(f"{path}/memory.stat", edit(MEMORY_STAT_V1, stat or {}))
        if memsw:
            self.put(f"{path}/memory.memsw.usage_in_bytes", f"{memsw[0]}\n")
            self.put(f"{path}/memory.memsw.limit_in_bytes", f"{memsw[1]}\n")


CGROUP = "/sys/fs/cgroup"
Look = Callable[..., int]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine on v2 with the process in /a/b, where nothing is limited; tests put limits over it."""
    made = Machine(tmp_path / "machine")
    made.process("0::/a/b\n", V2_MOUNT)
    made.put(f"{CGROUP}/memory.stat", MEMORY_STAT_V2)
    made.put(f"{CGROUP}/cgroup.procs", "")
    made.v2(f"{CGROUP}/a")
    made.v2(f"{CGROUP}/a/b")
    return made


@pytest.fixture
def look(program: Path, machine: Machine) -> Look:
    def ask(verb: str = "look") -> int:
        probe = Probe([str(program), str(machine.root)])
        try:
            return probe.ask(verb)
        finally:
            assert probe.end() == 0

    return ask


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


# ---- real cgroups ----------------------------------------------------------------------------------------------------

V1_ROOT = Path("/sys/fs/cgroup/memory")


class MemoryCgroup:
    """A memory cgroup of version 1, made for one test."""

    def __init__(self, path: Path, limit: int) -> None:
        self.path = path
        path.mkdir()
        (path / "memory.swappiness").write_text("0")  # a full cgroup kills also on a machine with swap
        (path / "memory.limit_in_bytes").write_text(str(limit))
        self.limit = limit

    def usage(self) -> int:
        return int((self.path / "memory.usage_in_bytes").read_text())

    def stat(self, key: str) -> int:
        match = re.search(rf"^{key} (\d+)", (self.path / "memory.stat").read_text(), re.MULTILINE)
        assert match is not None
        return int(match[1])

    def killed(self) -> int:
        """How many processes the OOM killer has killed here."""
        match = re.search(r"^oom_kill (\d+)", (self.path / "memory.oom_control").read_text(), re.MULTILINE)
        assert match is not None
        return int(match[1])


Spawn = Callable[[MemoryCgroup], Probe]


@pytest.fixture
def cgroup() -> Iterator[Callable[..., MemoryCgroup]]:
    """Makes cgroups, cgroup(limit) or cgroup(limit, parent); removes them when the test is over."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to make memory cgroups")
    if not (V1_ROOT / "memory.limit_in_bytes").exists():
        pytest.skip(f"needs the v1 memory controller at {V1_ROOT}")
    made: list[Path] = []

    def make(limit: int, parent: MemoryCgroup | None = None) -> MemoryCgroup:
        within = parent.path if parent else V1_ROOT
        path = within / f"samepage-test-{os.getpid()}-{len(made)}"
        made.append(path)
        return MemoryCgroup(path, limit)

    yield make
    for path in reversed(made):
        if path.exists():
            path.rmdir()


@pytest.fixture
def spawn(cgroup: object, program: Path) -> Iterator[Spawn]:
    """Starts probes inside a cgroup; all have ended before the cgroups are removed."""
    probes: list[Probe] = []

    def start(within: MemoryCgroup) -> Probe:
        enter = 'echo $$ > "$0" && exec "$1"'
        probes.append(Probe(["sh", "-c", enter, str(within.path / "cgroup.procs"), str(program)]))
        return probes[-1]

    yield start
    for probe in probes:
        probe.process.kill()
        probe.process.wait()


@pytest.fixture
def on_disk(tmp_path: Path) -> Path:
    """A directory whose files have page cache that can go."""
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(tmp_path)], capture_output=True, text=True, check=True)
    if kind.stdout.strip() == "tmpfs":
        pytest.skip("needs a temporary directory on a disk, and it is on tmpfs, whose pages are shared memory")
    return tmp_path


def cold_file(path: Path, size: int) -> Path:
    """A file of which nothing is in the page cache."""
    with path.open("wb") as file:
        file.write(os.urandom(size))
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


def near(value: int, expected: int) -> bool:
    return abs(value - expected) <= SLACK


def test_it_is_the_limit_less_what_was_taken(cgroup: Callable[..., MemoryCgroup], spawn: Spawn) -> None:
    probe = spawn(cgroup(128 * MIB))
    first = probe.ask("look")
    assert near(first, 128 * MIB)
    probe.ask(f"take {48 * MIB}")
    assert near(probe.ask("look"), first - 48 * MIB)


def test_clean_cache_is_still_headroom(cgroup: Callable[..., MemoryCgroup], spawn: Spawn, on_disk: Path) -> None:
    group = cgroup(128 * MIB)
    probe = spawn(group)
    first = probe.ask("look")
    assert probe.ask(f"read {cold_file(on_disk / 'cold', 48 * MIB)}") == 48 * MIB
    assert group.usage() > 48 * MIB
    assert near(probe.ask("look"), first)


def test_dirty_cache_is_no_headroom(cgroup: Callable[..., MemoryCgroup], spawn: Spawn, on_disk: Path) -> None:
    group = cgroup(128 * MIB)
    probe = spawn(group)
    first = probe.ask("look")
    assert probe.ask(f"write {on_disk / 'dirty'} {32 * MIB}") == 32 * MIB
    unwritten = group.stat("total_dirty") + group.stat("total_writeback")
    assert unwritten > 24 * MIB, "written back before it could be looked at"
    assert near(probe.ask("look"), first - unwritten)
    os.sync()
    assert near(probe.ask("look"), first)


def test_a_sibling_s_use_counts_against_their_parent(cgroup: Callable[..., MemoryCgroup], spawn: Spawn) -> None:
    parent = cgroup(128 * MIB)
    probe, sibling = (spawn(cgroup(UNLIMITED_V1, parent)) for _ in range(2))
    first = probe.ask("look")
    assert near(first, 128 * MIB)
    sibling.ask(f"take {64 * MIB}")
    assert near(probe.ask("look"), first - 64 * MIB)


def test_a_real_move_is_followed_at_once(cgroup: Callable[..., MemoryCgroup], spawn: Spawn) -> None:
    roomy, tight = cgroup(256 * MIB), cgroup(64 * MIB)
    probe = spawn(roomy)
    assert near(probe.ask("look"), 256 * MIB)
    (tight.path / "cgroup.procs").write_text(str(probe.process.pid))
    assert near(probe.ask("look"), 64 * MIB)


def test_a_look_that_found_plenty_is_not_good_for_long(cgroup: Callable[..., MemoryCgroup], spawn: Spawn) -> None:
    roomy, tight = cgroup(1024 * MIB), cgroup(64 * MIB)
    probe = spawn(roomy)
    assert probe.ask(f"room {MIB} {1000 * MIB}") <= 24 * MIB
    time.sleep(0.1)
    (tight.path / "cgroup.procs").write_text(str(probe.process.pid))
    assert probe.ask(f"room {MIB} {4 * MIB}") >= 32 * MIB
    assert tight.killed() == 0


def test_a_process_whose_leader_has_exited_is_still_limited(cgroup: Callable[..., MemoryCgroup], spawn: Spawn) -> None:
    probe = spawn(cgroup(64 * MIB))
    assert probe.ask("retire") == 0
    for _ in range(20):  # the leader may still be on its way out
        assert near(probe.ask("look"), 64 * MIB)


def test_who_does_not_ask_is_killed(cgroup: Callable[..., MemoryCgroup], spawn: Spawn) -> None:
    group = cgroup(64 * MIB)
    probe = spawn(group)
    probe.tell(f"take {80 * MIB}")
    assert probe.end() == -signal.SIGKILL
    assert group.killed() == 1


@pytest.mark.parametrize("how", ["fill", "room"])
@pytest.mark.parametrize("cache", ["empty", "clean", "dirty"])
def test_who_asks_fills_the_cgroup_and_lives(
    cgroup: Callable[..., MemoryCgroup], spawn: Spawn, on_disk: Path, cache: str, how: str
) -> None:
    group = cgroup(64 * MIB)
    probe = spawn(group)
    if cache == "clean":
        probe.ask(f"read {cold_file(on_disk / 'cold', 96 * MIB)}")
        assert group.usage() > 56 * MIB
    if cache == "dirty":
        probe.ask(f"write {on_disk / 'dirty'} {24 * MIB}")
    taken = probe.ask(f"{how} {MIB} {4 * MIB}")
    assert group.killed() == 0
    assert group.usage() >= 0.8 * group.limit
    if cache != "dirty":
        assert taken >= 0.8 * group.limit
    assert probe.ask("look") < 5 * MIB
    assert probe.end() == 0


@pytest.mark.parametrize("how", ["fill", "room"])
def test_two_that_ask_share_what_their_parent_has(cgroup: Callable[..., MemoryCgroup], spawn: Spawn, how: str) -> None:
    parent = cgroup(64 * MIB)
    probes = [spawn(cgroup(UNLIMITED_V1, parent)) for _ in range(2)]
    for probe in probes:
        probe.tell(f"{how} {MIB} {4 * MIB}")
    assert sum(probe.answer() for probe in probes) >= 0.8 * parent.limit
    assert parent.killed() == 0
    assert [probe.end() for probe in probes] == [0, 0]
