"""What three copies of applications save under samepage, and what that costs them.

    python -m benchmarks.apps                        # the table; what cannot run here is told with the reason
    python -m benchmarks.apps --rounds 5 --only node,redis --json build/apps.json

Each application runs bare, and under a service of its own with each `--memory`, in turn, `--rounds` times. *Could*:
what page-by-page merging of the bare copies would save, by `samepage scan`. *Saved*: `bytes_saved` when it grows no
more, before the application works on its data. Time and CPU are those of that work, the agents' and the service's
included, against the bare ones of the same round; of all the median.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.applications import APPLICATIONS, Application
from benchmarks.processes import environment
from samepage import agent

COPIES = 3
MIB = 1 << 20
MEMORY = ("large", "mapped", "all")
STEADY_SECONDS, STEADY_SCANS = 5.0, 4
"""No more is saved when it grew for no longer than that, and in no pass that looked at everything: memory that nobody
named is looked at when its process rests."""

PATIENCE_SECONDS = 60.0
TICK = os.sysconf("SC_CLK_TCK")


class Copies:
    """Some copies of an application, each in a session of its own."""

    def __init__(self, application: Application, folder: Path, more: dict[str, str]) -> None:
        self._processes = [
            subprocess.Popen(
                ["sh", "-c", application.command],
                cwd=folder / str(copy),
                env=environment(PYTHON=sys.executable) | more,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
            for copy in range(COPIES)
        ]

    def await_word(self, word: str) -> None:
        """EOFError when a copy ends before it says it."""
        for process in self._processes:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(word):
                    break
            else:
                raise EOFError(f"a copy ended with {process.wait()} before it was {word}")

    def pids(self) -> list[int]:
        """The processes that they are."""
        return [pid for pid, _ in self._stat()]

    def work(self) -> tuple[float, float]:
        """Have all of them work. The seconds that took, and of CPU."""
        cpu, began = self._cpu(), time.monotonic()
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("work\n")
            process.stdin.flush()
        self.await_word("done")
        return time.monotonic() - began, self._cpu() - cpu

    def end(self) -> None:
        """Have them end, or end them."""
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def _stat(self) -> Iterator[tuple[int, float]]:
        """Each process of theirs, and its seconds of CPU with those of children that ended."""
        sessions = {process.pid for process in self._processes}
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError, ValueError):
                fields = Path(f"/proc/{int(entry)}/stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) in sessions:
                    yield int(entry), sum(map(int, fields[11:15])) / TICK

    def _cpu(self) -> float:
        return sum(cpu for _, cpu in self._stat())


@contextlib.contextmanager
def _service(folder: Path) -> Iterator[tuple[str, int]]:
    """`samepage daemon`: where it listens, and its pid."""
    path = str(folder / "socket")
    command = [sys.executable, "-m", "samepage", "daemon", "--socket", path]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout is not None
        try:
            assert "listening" in daemon.stdout.readline()
            yield path, daemon.pid
        finally:
            daemon.terminate()


def _cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / TICK


def _samepage(*arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "samepage", *arguments], env=environment(), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def _steady(socket: str) -> int:
    """Bytes saved, once they grow no more."""
    best, since, scans = 0, time.monotonic(), 0
    deadline = since + PATIENCE_SECONDS
    while (now := time.monotonic()) < deadline:
        status = _samepage("status", "--socket", socket, "--json")
        if status["bytes_saved"] > best * 1.01 + 65536:
            best, since, scans = int(status["bytes_saved"]), now, int(status["full_scans"])
        seen = status["full_scans"] >= scans + STEADY_SCANS or not status["processes"]
        if seen and now - since >= STEADY_SECONDS:
            break
        time.sleep(0.3)
    return best


def _bare(application: Application, folder: Path) -> dict[str, float]:
    copies = Copies(application, folder, {})
    try:
        copies.await_word("ready")
        report = _samepage("scan", "--json", "-", *map(str, copies.pids()))
        seconds, cpu = copies.work()
    finally:
        copies.end()
    return {"could": report["by_page"]["saved_bytes"] / MIB, "seconds": seconds, "cpu": cpu}


def _merged(application: Application, folder: Path, memory: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as place, _service(Path(place)) as (socket, service):
        more = {"LD_PRELOAD": str(agent.library_path()), "SAMEPAGE_SOCKET": socket, "SAMEPAGE_MEMORY": memory}
        copies = Copies(application, folder, more)
        try:
            copies.await_word("ready")
            saved = _steady(socket)
            before = _cpu_of(service)
            seconds, cpu = copies.work()
            cpu += _cpu_of(service) - before
        finally:
            copies.end()
    return {"saved": saved / MIB, "seconds": seconds, "cpu": cpu}


def _measure(application: Application, rounds: int, memories: list[str]) -> dict[str, Any]:
    """Medians of all rounds."""
    runs: dict[str, list[dict[str, float]]] = {how: [] for how in ("bare", *memories)}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for copy in range(COPIES):
            (folder / str(copy)).mkdir()
            subprocess.run(
                ["sh", "-e", "-c", application.prepare], cwd=folder / str(copy), env=environment(), check=True
            )
        for _ in range(rounds):
            runs["bare"].append(_bare(application, folder))
            for memory in memories:
                runs[memory].append(_merged(application, folder, memory))
    bare = runs["bare"]
    row: dict[str, Any] = {"could": statistics.median(run["could"] for run in bare), "runs": runs}
    for memory in memories:
        pairs = list(zip(bare, runs[memory], strict=True))
        row[memory] = {
            "saved": statistics.median(run["saved"] for run in runs[memory]),
            "time": statistics.median(run["seconds"] / other["seconds"] for other, run in pairs) - 1,
            "cpu": statistics.median(run["cpu"] / max(other["cpu"], 0.01) for other, run in pairs) - 1,
        }
    return row


def _cell(result: dict[str, float]) -> str:
    return f"{result['saved']:.0f} ({result['time']:+.0%}, {result['cpu']:+.0%})"


def table_line(cells: list[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def arguments(description: str | None, rounds: int) -> argparse.Namespace:
    """Of a benchmark that measures programs with each `--memory`; `rounds` is the default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--only", default="", help="names or parts of names, separated by commas")
    parser.add_argument("--memory", default=",".join(MEMORY), help="which to measure, separated by commas")
    parser.add_argument("--json", type=Path, help="where all that was measured goes")
    return parser.parse_args()


def chosen(applications: list[Application], only: str) -> list[Application]:
    """Those of which a part of the name is in `only`."""
    wanted = [part.lower() for part in only.split(",")]
    return [one for one in applications if any(part in one.name.lower() for part in wanted)]


def main() -> None:
    args = arguments(__doc__, 3)
    memories = args.memory.split(",")
    rows: dict[str, Any] = {}
    print(f"{COPIES} copies; MiB saved (time, CPU against bare), medians of {args.rounds}\n")
    table_line(["", "could", *memories, ""])
    table_line(["---"] * (len(memories) + 3))
    for application in chosen(APPLICATIONS, args.only):
        missing = application.missing()
        if missing:
            table_line([application.name, *[""] * (len(memories) + 1), f"not run: {missing} is not installed"])
            continue
        try:
            row = rows[application.name] = _measure(application, args.rounds, memories)
        except (EOFError, BrokenPipeError, subprocess.CalledProcessError) as e:
            table_line([application.name, *[""] * (len(memories) + 1), f"did not run: {e}"])
            continue
        results = [_cell(row[memory]) for memory in memories]
        table_line([application.name, f"{row['could']:.0f}", *results, application.explained])
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
