"""Whether a process can answer, whatever its users call the cgroups that were delegated to them."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from samepage.memory import agent
from samepage.process import halt

NAMES = [b"plain", b"no text \xff", b"line\x0bline", b"line\rline", b"a:b:c", "line\u2028line".encode()]
ids = [ascii(name) for name in NAMES]


def listed(folder: Path, name: bytes) -> str:
    """A file as /proc/PID/cgroup is for a process in that cgroup."""
    file = folder / "listed"
    file.write_bytes(b"4:memory:/" + name + b"\n1:name=systemd:/\n0::/" + name + b"\n")
    return str(file)


@pytest.mark.parametrize("name", NAMES, ids=ids)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_cgroup_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: bytes, frozen: bool) -> None:
    group = os.fsencode(tmp_path) + b"/" + name
    os.mkdir(group)
    Path(os.fsdecode(group), "cgroup.events").write_text(f"populated 1\nfrozen {int(frozen)}\n")
    monkeypatch.setattr(halt, "_mounts", lambda: (None, ("/", str(tmp_path))))
    assert halt._is_frozen(listed(tmp_path, name)) == frozen


@pytest.mark.parametrize("name", NAMES, ids=ids)
def test_any_name_of_a_cgroup_can_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: bytes) -> None:
    path = listed(tmp_path, name)
    monkeypatch.setattr(agent, "cgroups_of", lambda _: list(halt.cgroups(path)))
    told = agent.memory_cgroup(os.getpid())
    assert told.startswith("/")
    told.encode()  # JSON takes no lone surrogates


@pytest.mark.parametrize("name", NAMES, ids=ids)
def test_a_mount_may_be_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: bytes) -> None:
    lines = [
        b"1 1 0:1 / /home/" + name.replace(b" ", b"\\040") + b" rw - fuse.x x rw",
        b"2 1 0:2 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw",
    ]
    file = tmp_path / "mountinfo"
    file.write_bytes(b"\n".join(lines) + b"\n")
    original = halt.lines_of
    monkeypatch.setattr(halt, "lines_of", lambda _: original(str(file)))
    assert halt._mounts.__wrapped__() == (None, ("/", "/sys/fs/cgroup"))


@pytest.fixture(params=["while :; do :; done", "kill -STOP $$"])
def program(request: pytest.FixtureRequest) -> Iterator[tuple[int, bool]]:
    """One that works, or one that does not, and whether it does."""
    with subprocess.Popen(["sh", "-c", request.param]) as process:
        yield process.pid, "STOP" not in request.param
        process.kill()


def test_a_process_gets_on_if_it_wants_to_run_or_did(program: tuple[int, bool]) -> None:
    pid, works = program
    time.sleep(0.3)
    before = halt.work_of(pid, pid)
    time.sleep(0.3)
    now = halt.work_of(pid, pid)
    assert now is not None
    assert now.gets_on(before) == works


def test_a_process_that_slept_does_not_get_on_and_one_that_spent_time_does() -> None:
    assert not halt.Work(False, 7).gets_on(halt.Work(False, 7))
    assert not halt.Work(False, 7).gets_on(None)
    assert halt.Work(False, 8).gets_on(halt.Work(False, 7))
    assert halt.Work(True, 7).gets_on(halt.Work(True, 7))


def test_a_thread_that_has_to_share_its_cpu_is_kept_from_it() -> None:
    command = ["taskset", "-c", str(min(os.sched_getaffinity(0))), "sh", "-c", "while :; do :; done"]
    pids = [subprocess.Popen(command) for _ in range(2)]
    try:
        time.sleep(1.0)
        assert 0.1 < halt.kept_from_cpu(pids[0].pid, pids[0].pid) < 1.5
    finally:
        for process in pids:
            process.kill()
            process.wait()
    assert halt.kept_from_cpu(pids[0].pid, pids[0].pid) == 0.0
