"""`samepage doctor`, and what it and the agents of this machine agree on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from samepage.memory.wire import Flags
from tests.agent.asked import Process
from tests.agent.preload import Preload, build_agent


def test_it_says_what_agents_come_to(tmp_path: Path) -> None:
    preload = Preload(build_agent(tmp_path), "")
    for option, flags in (("move", Flags(0)), ("wp", Flags.SWAP_WP)):
        done = subprocess.run(["samepage", "doctor", "--json", "--swap", option], capture_output=True, text=True)
        answer = json.loads(done.stdout)
        folder = tmp_path / option
        folder.mkdir()
        process = Process(preload, folder, flags=flags)
        assert answer["swap"] == process.space.swap.name.lower()
        assert answer["merges"] == (answer["swap"] in ("move", "wp")) == (done.returncode == 0)
        process.end()


def test_in_plain_words() -> None:
    done = subprocess.run(["samepage", "doctor"], capture_output=True, text=True)
    for name in ("kernel", "userfaultfd", "swap", "memory cgroup", "vm.max_map_count"):
        assert name in done.stdout
    assert done.stderr == ""


def test_a_command_whose_pages_are_swapped_by_write_protection_is_merged(tmp_path: Path) -> None:
    report = tmp_path / "saved.json"
    program = "import time; a = [bytearray(bytes(range(256)) * (64 << 10)) for _ in range(2)]; time.sleep(3)"
    command = ["samepage", "run", "--swap", "wp", "--set", "sleep_millisecs=0", "--json", str(report)]
    done = subprocess.run([*command, "--", "python3", "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    if found["swap"] == ["wp"]:
        assert found["bytes_saved_peak"] > 10 << 20
    else:
        assert "nothing is merged" in done.stderr


NOBODY = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]


def test_who_may_not_open_the_device_of_userfaultfd_is_told_what_to_do() -> None:
    device = Path("/dev/userfaultfd")
    if os.geteuid() or Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "1":
        pytest.skip("needs root to become another user, and a machine that gives userfaultfd to root alone")
    if device.exists() and device.stat().st_mode & 0o006:
        pytest.skip("/dev/userfaultfd is everybody's here")
    done = subprocess.run([*NOBODY, "samepage", "doctor", "--json"], capture_output=True, text=True)
    if not done.stdout:
        pytest.skip(f"another user cannot run samepage from here: {done.stderr}")
    answer = json.loads(done.stdout)
    assert done.returncode == 1
    assert answer["facts"]["userfaultfd"] == "user mode"
    assert "samepage daemon" in answer["why"]


def test_where_memfds_must_not_be_executable_pages_are_merged(tmp_path: Path) -> None:
    """vm.memfd_noexec is a pid namespace's own."""
    report = tmp_path / "saved.json"
    program = "import time; a = [bytearray(bytes(range(256)) * (64 << 10)) for _ in range(2)]; time.sleep(3)"
    run = ["samepage", "run", "--set", "sleep_millisecs=0", "--json", str(report), "--", "python3", "-c", program]
    script = 'echo 2 > /proc/sys/vm/memfd_noexec || exit 9; samepage doctor --json; "$@"'
    command = ["unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", script, "sh", *run]
    if os.geteuid() or not Path("/proc/sys/vm/memfd_noexec").exists():
        pytest.skip("needs root, and vm.memfd_noexec (Linux 6.3)")
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    if done.returncode == 9:
        pytest.skip("no pid namespace, or no writable sysctl, is to be had here")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["facts"]["memfd"]
    found = json.loads(report.read_text())
    assert found["bytes_saved_peak"] > 10 << 20 or "move" not in found["swap"]


OLD = """
import os, sys
real = os.uname()
os.uname = lambda: os.uname_result((real.sysname, real.nodename, "5.9.16", real.version, real.machine))
from samepage.commands import main
sys.exit(main())
"""


@pytest.mark.parametrize("command", [["daemon"], ["run", "--reserve", "1M", "--", "echo", "it ran"]])
def test_below_the_oldest_kernel_it_is_refused(tmp_path: Path, command: list[str]) -> None:
    options = ["--socket", str(tmp_path / "socket")] if command == ["daemon"] else []
    done = subprocess.run([sys.executable, "-c", OLD, *command, *options], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Linux 5.9.16 is too old: 5.10 is the oldest" in done.stderr
    assert len(done.stderr.splitlines()) == 1
