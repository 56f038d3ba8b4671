"""Processes that cannot see what limits them: nothing is risked. Those that see their own cgroup are merged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import memory_cgroup
from benchmarks.memory_cgroup import MemoryCgroup
from tests.oom.conftest import needs_agent

PROGRAM = "import os, time; a = bytes(range(256)) * 16 * 1024; time.sleep(6)"
TWO = f'"{sys.executable}" -c "{PROGRAM}" & "{sys.executable}" -c "{PROGRAM}"; wait'

pytestmark = [needs_agent, pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare(1)")]


def run_within(group: MemoryCgroup, arrange: str, report: Path) -> tuple[dict[str, Any], str]:
    """Two equal processes under `samepage run`, in the cgroup, in mount and cgroup namespaces that `arrange` changes.
    The report, and what was said."""
    script = f'echo $$ > "{group.path}/cgroup.procs" && exec unshare --mount --cgroup sh -c "$0" "$@"'
    command = ["sh", "-ec", script, f'{arrange}; exec "$0" "$@"']
    command += [sys.executable, "-m", "samepage", "run", "--json", str(report), "sh", "-c", TWO]
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(report.read_text()), done.stderr


def test_where_the_cgroup_is_nowhere_mounted_nothing_is_merged_and_the_reason_is_said(
    group: MemoryCgroup, tmp_path: Path
) -> None:
    report, said = run_within(group, "umount -R -l /sys/fs/cgroup", tmp_path / "report")
    assert len(report["processes"]) == 2
    assert report["bytes_saved_peak"] == 0
    assert report["merge_failures"]["NOMEM"] > 0
    assert "cannot be read from inside" in said


def test_a_container_that_sees_its_own_cgroup_and_nothing_above_is_merged(group: MemoryCgroup, tmp_path: Path) -> None:
    kind = "-t cgroup2" if memory_cgroup.version() == 2 else "-t cgroup -o memory"
    at = "/sys/fs/cgroup" if memory_cgroup.version() == 2 else "/sys/fs/cgroup/memory"
    report, _ = run_within(group, f"umount -l {at}; mount {kind} none {at}", tmp_path / "report")
    assert report["bytes_saved_peak"] >= 3 << 20
