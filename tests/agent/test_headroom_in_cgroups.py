"""What headroom() promises, in real memory cgroups of version 1, which are filled."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.agent.headroom import MIB, SLACK, UNLIMITED_V1, Probe, program

__all__ = ["program"]

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
