"""Whether a process can answer, whatever its users call the cgroups that were delegated to them."""

from __future__ import annotations

import os
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
