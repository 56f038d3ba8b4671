"""What is believed of the cgroup of a process, whatever it does about it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from samepage.memory.agent import memory_cgroup
from samepage.service.cgroups import Group, group_of
from tests.service.test_policy import a_slice, needs_root

ID = "0123456789abcdef" * 4

LEADERLESS = """
import ctypes, os, sys, threading
def go_on():
    while open("/proc/self/stat").read().rpartition(")")[2].split()[0] != "Z":
        pass
    os.write(1, b"ended\\n")
    os.read(0, 1)
    os._exit(0)
threading.Thread(target=go_on).start()
ctypes.CDLL(None).syscall(60, 0)  # exit(2), of this thread alone
"""


@pytest.mark.parametrize(
    "path",
    [
        f"/system.slice/web.service/docker-{ID}.scope",
        f"/system.slice/web.service/docker/{ID}",
        f"/system.slice/web.service/x.slice/libpod-{ID}.scope",
        f"/system.slice/kubepods.slice/docker/{ID}",
        "/system.slice/web.service/lxc.payload.db",
        "/system.slice/web.service/machine-db.scope",
        f"/web/docker-{ID}.scope",
        f"/../user.slice/user-7.slice/user@7.service/docker-{ID}.scope",
    ],
)
def test_a_container_is_none_where_others_name_cgroups(path: str) -> None:
    """A service that was given its cgroup (Delegate=) may name what is in it after somebody's container."""
    assert not Group(path).container


@needs_root
def test_a_process_whose_first_thread_has_ended_is_in_the_cgroup_of_the_others() -> None:
    with a_slice() as group:
        process = subprocess.Popen(
            [sys.executable, "-c", LEADERLESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ended\n"
            (group / "cgroup.procs").write_text(str(process.pid))
            assert group_of(process.pid).slices == [group.name]
            assert memory_cgroup(process.pid) == memory_cgroup(os.getpid())
        finally:
            process.kill()
            process.communicate()
