"""Both engines at work: `samepage run` and `samepage daemon` with `--engine auto`, and what commands show of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.exposition import generate_latest

from benchmarks import kernel_ksm
from benchmarks.processes import service, wait_until
from benchmarks.scrape import scrape
from samepage.kernel.unmerge import Merged
from samepage.service.engine import Answer, Engines
from samepage.service.metrics import Metrics
from samepage.service.scanner import Scanner
from tests.kernel.conftest import Holder, StartHolder, mergeable, mergeable_mappings, needs_ksm, samepage

KNOBS = ("run", "pages_to_scan", "sleep_millisecs")
DEFAULTS = kernel_ksm.DEFAULTS | {"advisor_mode": "none"}
DYNAMIC = "import time; a = bytearray(bytes(range(256)) * 16 * 8192); time.sleep(60)"


def knobs() -> list[int]:
    return [kernel_ksm.read(name) for name in KNOBS]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@needs_ksm
def test_each_process_is_served_by_one_engine_and_status_says_by_which(holder: Path, folder: Path) -> None:
    static = f"(sleep 60; :) | {holder} 16"
    dynamic = f"{sys.executable} -c '{DYNAMIC}'"
    script = f"echo $SAMEPAGE_SOCKET > {folder}/socket; {static} & {static} & {dynamic} & {dynamic} & wait"
    with kernel_ksm.borrowed(run=0, **DEFAULTS):
        before = knobs()
        command = [sys.executable, "-m", "samepage", "run", "--engine", "auto", "--", "sh", "-c", script]
        with tempfile.TemporaryFile("w+") as errors:
            run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True)
            try:
                wait_until((folder / "socket").exists, "started")
                path = (folder / "socket").read_text().strip()
                merged: dict[str, list[int]] = {"kernel": [4000] * 2, "user": [8000, 8000]}

                def all_merged() -> bool:
                    rows = status(path)["processes"]
                    return all(
                        sum(row["merged"] >= least[0] for row in rows if row["engine"] == engine) >= 2
                        for engine, least in merged.items()
                    )

                wait_until(all_merged, "merged by both", 60)
                found = status(path)
                assert found["engines"]["kernel"]["bytes_saved"] >= 4000 * 4096
                pids = [row["pid"] for row in found["processes"]]
                assert len(pids) == len(set(pids))
                for row in found["processes"]:
                    assert mergeable(row["pid"]) == (row["engine"] == "kernel")
                    assert ("libsamepage.so" in maps(row["pid"])) == (row["engine"] == "user")
                table = samepage("status", "--socket", path).stdout
                assert {"counter", "user", "kernel"} <= set(table.splitlines()[0].split())
                assert "engine" in table
            finally:
                os.killpg(run.pid, 15)
                run.wait(30)
            errors.seek(0)
            assert "the kernel: shared " in errors.read()
        wait_until(lambda: knobs() == before, "put back", 10)


@needs_ksm
def test_the_exit_status_is_the_commands_though_it_is_attached_to_itself(holder: Path) -> None:
    """Who traces a child of its own is told of its stops and its end as a tracer and as a parent."""
    with kernel_ksm.borrowed(run=0, **DEFAULTS):
        for how, expected in (("eof", 0), ("kill", 128 + signal.SIGKILL)) * 2:
            command = [sys.executable, "-m", "samepage", "run", "--engine", "auto", "--", str(holder), "4"]
            pipe = subprocess.PIPE
            run = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
            assert run.stdout is not None
            assert run.stdout.readline() == "ready\n"
            (static,) = (pid for pid in children(run.pid) if maps(pid).count("/holder"))
            wait_until(lambda: mergeable(static), "attached", 20)  # noqa: B023
            if how == "kill":
                os.kill(static, signal.SIGKILL)
            _, errors = run.communicate(timeout=30)
            assert (run.returncode, "Traceback" in errors) == (expected, False), errors
        assert kernel_ksm.read("run") == 0


@needs_ksm
def test_a_command_that_ends_while_it_is_attached_to_has_its_status(holder: Path) -> None:
    script = f"(sleep 0.$1; :) | {holder} 2 >/dev/null; exit $((40 + $1))"
    with kernel_ksm.borrowed(run=0, **DEFAULTS):
        for tenth in range(2, 8):
            done = samepage("run", "--engine", "auto", "--", "sh", "-c", script, "sh", str(tenth))
            assert (done.returncode, "Traceback" in done.stderr) == (40 + tenth, False), done.stderr
        assert kernel_ksm.read("run") == 0


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def status(path: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(samepage("status", "--json", "--socket", path).stdout)
    return found


def merged_now(holder: Holder) -> int:
    """Not by the kernel's counter, which ksmd puts right when it comes by."""
    merged = Merged()
    try:
        return sum(size for _, _, size in merged.ranges(holder.pid)) // 4096
    finally:
        merged.close()


def maps(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


@needs_ksm
def test_a_daemon_shows_and_unmerges_what_is_attached_to(start: StartHolder, folder: Path) -> None:
    with kernel_ksm.borrowed(run=0, **(DEFAULTS | {"pages_to_scan": "20000", "sleep_millisecs": "1"})):
        holders = [start() for _ in range(2)]
        metrics = str(folder / "metrics")
        with service(folder, "--engine", "auto", "--metrics", metrics) as path:
            assert kernel_ksm.read("run") == 0  # there is nothing for it to do
            assert samepage("attach", *(str(holder.pid) for holder in holders)).returncode == 0
            assert kernel_ksm.read("run") == 1
            wait_until(lambda: all(h.merged() >= 0.99 * h.pages for h in holders), "merged", 60)
            wait_until(lambda: {row["pid"] for row in status(path)["processes"]} >= {h.pid for h in holders}, "shown")
            rows = {row["pid"]: row for row in status(path)["processes"]}
            assert {rows[h.pid]["engine"] for h in holders} == {"kernel"}
            assert rows[holders[0].pid]["bytes_available"] > 0
            found = scrape(metrics)
            assert found['samepage_engine_processes{engine="kernel"}'] >= 2
            saved = found['samepage_engine_saved_bytes{engine="kernel"}']
            assert saved >= 0.99 * holders[0].pages * 4096  # one of two
            assert found['samepage_engine_processes{engine="user"}'] == 0
            kernel_ksm.write("run", 0)
            done = samepage("unmerge", "--socket", path, "--pid", str(holders[0].pid), "--json")
            assert json.loads(done.stdout)["pages_unmerged"] >= 0.99 * holders[0].pages
            assert merged_now(holders[0]) == 0 < merged_now(holders[1])
            kernel_ksm.write("run", 1)
        assert kernel_ksm.read("run") == 1  # these are attached still
        assert samepage("detach", *(str(holder.pid) for holder in holders)).returncode == 0
        assert kernel_ksm.read("run") == 0
        assert all(holder.intact() for holder in holders)


@needs_ksm
def test_set_run_2_of_the_kernel_unmerges_and_is_never_written(start: StartHolder) -> None:
    with kernel_ksm.borrowed(run=0, **kernel_ksm.FASTEST):
        holders = [start() for _ in range(2)]
        assert samepage("attach", *(str(holder.pid) for holder in holders)).returncode == 0
        wait_until(lambda: all(h.merged() >= 0.99 * h.pages for h in holders), "merged", 60)
        assert samepage("get", "--engine", "kernel", "run").stdout == "1\n"
        done = samepage("set", "--engine", "kernel", "run", "2")
        assert (done.returncode, done.stderr) == (0, "")
        assert kernel_ksm.read("run") == 0
        assert not any(merged_now(holder) for holder in holders)
        assert all(mergeable_mappings(holder.pid) and holder.intact() for holder in holders)
        assert samepage("set", "--engine", "kernel", "max_page_sharing", "1").returncode == 1
        assert "no knob" in samepage("get", "--engine", "kernel", "walk").stderr
        assert samepage("detach", *(str(holder.pid) for holder in holders)).returncode == 0


class Fake:
    """An engine with these processes, which unmerges a page of each, or fails."""

    def __init__(self, name: str, pids: list[int], errno: str | None = None) -> None:
        self.name, self._pids, self._errno = name, pids, errno
        self.asked: list[list[int]] = []

    def rows(self) -> list[Answer]:
        return [{"pid": pid, "comm": "x", "bytes_needed": 4096} for pid in self._pids]

    def commitments(self) -> list[Answer]:
        return [row | {"cgroup": "/a", "bytes_available": 100 - row["pid"]} for row in self.rows()]

    def row(self, pid: int) -> Answer | None:
        return next((row for row in self.rows() if row["pid"] == pid), None)

    def counters(self, domain: int | None = None) -> Answer:
        return {"pages_sharing": len(self._pids)}

    def unmerge(self, pids: list[int], progress: Callable[[Answer], None], cancelled: Callable[[], bool]) -> Answer:
        self.asked.append(pids)
        told = {"errno": self._errno, "bytes_needed": 7, "bytes_available": 3, "limits_unseen": False}
        return told | {"pages_unmerged": len(pids or self._pids), "pages_remaining": 1, "failed": [], "ok": True}


def test_metrics_have_what_each_engine_saves() -> None:
    """`metrics` of a service with both, and without: no series of an engine that is not there."""
    found = generate_latest(Metrics(Scanner(), [Merging("kernel", [3, 4])])).decode()  # type: ignore[list-item]
    assert 'samepage_engine_processes{engine="user"} 0.0' in found
    assert 'samepage_engine_processes{engine="kernel"} 2.0' in found
    assert 'samepage_engine_merged_bytes{engine="kernel"} 81920.0' in found
    assert 'samepage_engine_saved_bytes{engine="kernel"} 40960.0' in found
    assert "samepage_engine" not in generate_latest(Metrics(Scanner())).decode()


class Merging(Fake):
    """With ten merged pages in each process."""

    def rows(self) -> list[Answer]:
        return [row | {"merged": 10} for row in super().rows()]

    def counters(self, domain: int | None = None) -> Answer:
        return {"bytes_saved": 40960}


def both(errno: str | None = None) -> tuple[Fake, Fake, Engines]:
    user, kernel = Fake("user", [1, 2]), Fake("kernel", [3], errno)
    return user, kernel, Engines(user, [kernel])  # type: ignore[arg-type,list-item]


def test_rows_of_all_engines_are_in_one_table_and_their_sums_in_one_for_cgroups() -> None:
    _, _, engines = both()
    rows, groups = engines.commitments()
    assert [(row["pid"], row["engine"]) for row in rows] == [(1, "user"), (2, "user"), (3, "kernel")]
    assert groups == [{"cgroup": "/a", "processes": 3, "bytes_needed": 3 * 4096, "bytes_available": 97}]
    assert engines.by_engine() == {"user": {"pages_sharing": 2}, "kernel": {"pages_sharing": 1}}


def test_who_joined_after_the_kernels_engine_looked_has_one_row() -> None:
    engines = Engines(Fake("user", [1, 2]), [Fake("kernel", [2, 3])])  # type: ignore[arg-type,list-item]
    expected = [(1, "user"), (2, "user"), (3, "kernel")]
    assert [(row["pid"], row["engine"]) for row in engines.rows()] == expected
    rows, groups = engines.commitments()
    assert [(row["pid"], row["engine"]) for row in rows] == expected
    assert groups[0]["processes"] == 3


def test_each_engine_unmerges_its_own() -> None:
    user, kernel, engines = both("ENOMEM")
    done = engines.unmerge([3, 1], lambda _: None, lambda: False)
    assert (user.asked, kernel.asked) == ([[1]], [[3]])
    assert (done["ok"], done["errno"], done["pages_unmerged"], done["pages_remaining"]) == (False, "ENOMEM", 2, 2)
    assert done["bytes_needed"] == 2 * 7
    assert engines.unmerge([], lambda _: None, lambda: False)["pages_unmerged"] == 3
    with pytest.raises(ProcessLookupError, match="process 4 is served by no engine"):
        engines.unmerge([4], lambda _: None, lambda: False)
