"""`samepage run --engine kernel`: what it starts is merged by the kernel, whatever it is linked with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from benchmarks import kernel_ksm
from benchmarks.processes import wait_until
from tests.kernel.conftest import mergeable, needs_ksm, samepage

pytestmark = needs_ksm

FAST = {"pages_to_scan": "100000", "sleep_millisecs": "1", "advisor_mode": "none"}
KNOBS = ("run", "pages_to_scan", "sleep_millisecs")


def knobs() -> list[int]:
    return [kernel_ksm.read(name) for name in KNOBS]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_static_programs_and_what_they_start_are_merged(holder: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    go = tmp_path / "go"
    wait = f"while ! test -e {go}; do sleep 0.2; done; echo check"
    script = f"({wait}) | {holder} 16 & ({wait}) | {holder} 16; wait"
    options = ["--json", str(report), "--set", "pages_to_scan=100000", "--set", "sleep_millisecs=1"]
    with kernel_ksm.borrowed(run=0, pages_to_scan=100, sleep_millisecs=20, advisor_mode="none"):
        before = knobs()
        command = [sys.executable, "-m", "samepage", "run", "--engine", "kernel", *options, "--", "sh", "-c", script]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        merged = 0.95 * (32 << 20)
        wait_until(
            lambda: report.exists() and json.loads(report.read_text())["bytes_shared_peak"] >= merged, "merged", 60
        )
        go.touch()
        said, errors = run.communicate(timeout=30)
        assert knobs() == before
    assert run.returncode == 0
    assert sorted(said.split()) == ["0", "0", "ready", "ready"]
    found = json.loads(report.read_text())
    assert found["engine"] == "kernel"
    names = {row["comm"] for row in found["processes"]}
    assert names >= {"sh", "holder"}
    assert "shared 3" in errors


def test_the_exit_status_is_the_commands() -> None:
    with kernel_ksm.borrowed(run=0):
        assert samepage("run", "--engine", "kernel", "--", "sh", "-c", "exit 7").returncode == 7
        assert samepage("run", "--engine", "kernel", "--", "sh", "-c", "kill -9 $$").returncode == 137
        assert samepage("run", "--engine", "kernel", "--", "/nonexistent").returncode == 127
        assert kernel_ksm.read("run") == 0


def test_what_the_agent_alone_has_is_wrong_usage() -> None:
    done = samepage("run", "--engine", "kernel", "--swap", "wp", "--", "true")
    assert done.returncode == 2
    assert "--swap is for --engine user" in done.stderr


def test_after_sigkill_the_command_goes_on_merged_and_the_next_start_puts_everything_back() -> None:
    with kernel_ksm.borrowed(run=0, pages_to_scan=100, sleep_millisecs=20, advisor_mode="none"):
        before = knobs()
        command = [sys.executable, "-m", "samepage", "run", "--engine", "kernel", "--set", "pages_to_scan=5000"]
        run = subprocess.Popen([*command, "--", "sleep", "60"])
        wait_until(lambda: bool(children(run.pid)), "started")
        (sleep,) = children(run.pid)
        wait_until(lambda: Path(f"/proc/{sleep}/comm").read_text() == "sleep\n", "executed")
        wait_until(lambda: str(sleep) in Path("/run/samepage-kernel.json").read_text(), "held")
        run.kill()
        run.wait()
        samepage("run", "--engine", "kernel", "--", "true")
        assert knobs() == [1, 5000, 20]  # the command still needs it
        assert mergeable(sleep)
        os.kill(sleep, signal.SIGKILL)
        wait_until(lambda: not os.path.exists(f"/proc/{sleep}") or "Z" in _state(sleep), "ended")
        samepage("run", "--engine", "kernel", "--", "true")
        assert knobs() == before


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_new_memory_is_merged_at_once_though_ksmd_is_at_its_defaults(holder: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    go = tmp_path / "go"
    wait = f"while ! test -e {go}; do sleep 0.2; done; echo check"
    script = f"({wait}) | {holder} 128 & ({wait}) | {holder} 128; wait"
    with kernel_ksm.borrowed(run=0, **(kernel_ksm.DEFAULTS | {"advisor_mode": "none"})):
        before = knobs()
        command = [sys.executable, "-m", "samepage", "run", "--engine", "kernel", "--json", str(report)]
        run = subprocess.Popen([*command, "--", "sh", "-c", script], stdout=subprocess.PIPE, text=True)
        merged = 0.95 * (256 << 20)
        wait_until(
            lambda: report.exists() and json.loads(report.read_text())["bytes_shared_peak"] >= merged, "merged", 90
        )
        wait_until(lambda: knobs() == [1, *before[1:]], "as slow as before", 60)
        go.touch()
        said, _ = run.communicate(timeout=30)
        assert knobs() == before
    assert sorted(said.split()) == ["0", "0", "ready", "ready"]
