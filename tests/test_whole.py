"""samepage as its users meet it: plain programs under `samepage run` and `samepage daemon`, real memory saved."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

SAMEPAGE = [sys.executable, "-m", "samepage"]
MIB = 1 << 20
PATIENCE = 60.0
"""Seconds until it counts as never. How fast it is on a quiet machine, the benchmarks say."""

# Builds an array, says so, waits, writes every 100th page, and looks at all of it. Knows nothing of samepage.
WORKER = """
import sys, time, pathlib
import numpy as np
directory, me, mebibytes, seed = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
def build():
    return np.random.default_rng(seed).integers(0, 256, mebibytes << 20, np.uint8)
array = build()
(directory / f"ready.{me}").touch()
while not (directory / "write").exists():
    time.sleep(0.05)
array[:: 100 * 4096] = int(me) + 1
(directory / f"wrote.{me}").touch()
while not (directory / "check").exists():
    time.sleep(0.05)
expected = build()
expected[:: 100 * 4096] = int(me) + 1
sys.exit(0 if (array == expected).all() else 3)
"""


def wait_for(what: Callable[[], bool], seconds: float, why: str) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"after {seconds} s: {why}"
        time.sleep(0.05)


def smaps(pid: int, *keys: str) -> int:
    """Sum of the fields of /proc/PID/smaps_rollup, in bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return sum(int(line.split()[1]) * 1024 for line in lines if line.split(":")[0] in keys)


class Workers:
    """Some `WORKER`s, and what they share."""

    def __init__(self, directory: Path, env: dict[str, str], count: int, mebibytes: int, same: bool = True) -> None:
        self.directory = directory
        for old in directory.glob("[rwc]*"):
            old.unlink()
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, str(directory), str(i), str(mebibytes), str(1 if same else i)], env=env
            )
            for i in range(count)
        ]

    def wait_ready(self) -> None:
        self._wait("ready")

    def write(self) -> None:
        (self.directory / "write").touch()
        self._wait("wrote")

    def check(self) -> None:
        """Every process finds all its data as it should be."""
        (self.directory / "check").touch()
        assert [p.wait(60) for p in self.processes] == [0] * len(self.processes)

    def pss(self) -> int:
        return sum(smaps(p.pid, "Pss") for p in self.processes)

    def kill(self) -> None:
        for p in self.processes:
            p.kill()
            p.wait()

    def _wait(self, name: str) -> None:
        for i, p in enumerate(self.processes):
            path = self.directory / f"{name}.{i}"
            deadline = time.monotonic() + PATIENCE
            while not path.exists() and p.poll() is None:
                assert time.monotonic() < deadline, f"no {path}"
                time.sleep(0.05)
            assert p.poll() is None, f"worker {i} ended with {p.returncode}"


@contextmanager
def private_service(directory: Path, *options: str) -> Iterator[dict[str, str]]:
    """A `samepage run` that waits; gives the environment of what runs under it."""
    show = "import os, sys, json; print(json.dumps(dict(os.environ)), flush=True); sys.stdin.read()"
    run = subprocess.Popen(
        [*SAMEPAGE, "run", "--json", str(directory / "out.json"), *options, "--", sys.executable, "-c", show],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdin is not None
    assert run.stdout is not None
    try:
        yield json.loads(run.stdout.readline())
    finally:
        run.stdin.close()
        run.wait(30)


@contextmanager
def daemon(socket: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([*SAMEPAGE, "daemon", "--socket", str(socket)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()  # where it listens
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def library() -> str:
    from samepage import agent

    return str(agent.library_path())


def status(socket: Path) -> dict[str, object]:
    done = subprocess.run([*SAMEPAGE, "status", "--socket", str(socket), "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def needs_swap(env_status: dict[str, object]) -> None:
    rows = env_status["processes"]
    assert isinstance(rows, list)
    if rows and all(row["swap"] not in ("move", "wp") for row in rows):
        pytest.skip("no userfaultfd that may stop system calls: needs root or vm.unprivileged_userfaultfd=1")


def test_four_plain_numpy_processes_share_one_copy_and_lose_nothing(tmp_path: Path) -> None:
    with private_service(tmp_path, "--set", "run=0") as env:
        workers = Workers(tmp_path, env, count=4, mebibytes=256)
        try:
            workers.wait_ready()
            before = workers.pss()
            subprocess.run([*SAMEPAGE, "set", "run", "1"], env=env, check=True)
            started = time.monotonic()
            wait_for(lambda: before - workers.pss() >= 700 * MIB, PATIENCE, "PSS has not fallen by 700 MiB")
            print(f"700 MiB saved {time.monotonic() - started:.2f} s after merging was switched on")
            time.sleep(1.5)  # the file is written once a second
            fell = before - workers.pss()
            saved = json.loads((tmp_path / "out.json").read_text())["bytes_saved"]
            assert abs(saved - fell) <= 0.03 * fell, f"claims {saved / MIB:.1f} MiB, PSS fell by {fell / MIB:.1f} MiB"
            workers.write()
            workers.check()
        finally:
            workers.kill()


def test_arrays_are_merged_as_they_are_built_at_the_defaults(tmp_path: Path) -> None:
    with private_service(tmp_path) as env:
        workers = Workers(tmp_path, env, count=4, mebibytes=256)
        try:
            workers.wait_ready()
            started = time.monotonic()
            wait_for(lambda: workers.pss() < 4 * 40 * MIB + 256 * MIB, PATIENCE, "not merged")
            print(f"merged {time.monotonic() - started:.2f} s after all arrays were built")
            workers.write()
            workers.check()
        finally:
            workers.kill()


def test_the_agent_adds_less_than_a_mebibyte_of_private_memory_to_a_process(tmp_path: Path) -> None:
    private = "Private_Clean", "Private_Dirty"
    with private_service(tmp_path) as env:
        alone = Workers(tmp_path, {k: v for k, v in env.items() if k != "LD_PRELOAD"}, count=1, mebibytes=256)
        try:
            alone.wait_ready()
            bare = smaps(alone.processes[0].pid, *private)
        finally:
            alone.kill()
        workers = Workers(tmp_path, env, count=1, mebibytes=256)
        try:
            workers.wait_ready()
            time.sleep(2)  # every page was hashed by then
            joined = smaps(workers.processes[0].pid, *private)
            report = json.loads((tmp_path / "out.json").read_text())
        finally:
            workers.kill()
    assert report["pages_scanned"] >= 256 * 256
    assert joined - bare < MIB, f"{joined - bare} bytes"


def test_the_service_takes_less_than_60_mebibytes_and_16_bytes_a_page(tmp_path: Path) -> None:
    with private_service(tmp_path) as env:
        workers = Workers(tmp_path, env, count=3, mebibytes=512, same=False)
        try:
            workers.wait_ready()
            time.sleep(4)
            report = json.loads((tmp_path / "out.json").read_text())
        finally:
            workers.kill()
    pages = sum(row["ksm_rmap_items"] for row in report["processes"])
    assert pages >= 3 * 512 * 256
    assert report["metadata_bytes"] <= 16 * pages
    assert report["service_rss_bytes"] <= 60 * MIB + 16 * pages


def test_processes_outlive_the_service_and_join_the_next_one(tmp_path: Path) -> None:
    socket = tmp_path / "socket"
    env = os.environ | {"LD_PRELOAD": library(), "SAMEPAGE_SOCKET": str(socket)}
    workers = Workers(tmp_path, env, count=2, mebibytes=64)  # before there is any service
    try:
        workers.wait_ready()
        alone = workers.pss()
        with daemon(socket) as first:
            wait_for(lambda: alone - workers.pss() > 60 * MIB, PATIENCE, "not merged by the first service")
            needs_swap(status(socket))
            first.send_signal(signal.SIGKILL)
            first.wait()
        workers.write()
        with daemon(socket):
            # What is merged already is found and counted; what was written is not claimed.
            wait_for(
                lambda: int(str(status(socket)["pages_sharing"])) > 15_000, PATIENCE, "the second service finds nothing"
            )
            assert int(str(status(socket)["bytes_saved"])) <= alone - workers.pss() + MIB
            workers.check()
    finally:
        workers.kill()


def test_a_service_killed_in_the_middle_of_merging_costs_nobody_a_byte(tmp_path: Path) -> None:
    socket = tmp_path / "socket"
    env = os.environ | {"LD_PRELOAD": library(), "SAMEPAGE_SOCKET": str(socket)}
    for delay in np.linspace(0.02, 0.5, 6):
        with daemon(socket) as service:
            workers = Workers(tmp_path, env, count=3, mebibytes=48)
            try:
                workers.wait_ready()
                time.sleep(float(delay))
                service.send_signal(signal.SIGKILL)
                service.wait()
                workers.write()
                workers.check()
            finally:
                workers.kill()
