"""What programs that share nothing pay for samepage.

    python -m benchmarks.overhead                          # the table
    python -m benchmarks.overhead --rounds 9 --only node,gcc --memory mapped --json build/overhead.json

Each job runs bare, and under a daemon with each `--memory`, in turn, `--rounds` times. Time is that of the whole job,
from its start to its end; CPU that of all its processes, agents included, and of the daemon. Both are against the bare
run of the same round; the table has the medians, and half of the distance between their quartiles.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.applications import Application
from benchmarks.apps import arguments, chosen, table_line
from benchmarks.bench.meters import process_cpu
from benchmarks.bench.sides import who_listens
from benchmarks.jobs import JOBS
from benchmarks.processes import environment, service
from samepage import agent

BARE = "bare"
Run = tuple[float, float]
"""Seconds, and of CPU."""


def _run(job: Application, folder: Path, how: str, socket: str, daemon: int) -> Run:
    """`daemon`: the pid of who listens at `socket`."""
    more = {"PYTHON": sys.executable}
    if how != BARE:
        more |= {"LD_PRELOAD": str(agent.library_path()), "SAMEPAGE_SOCKET": socket, "SAMEPAGE_MEMORY": how}
    before, began = process_cpu(daemon), time.monotonic()
    # The agent is for the job, not for the shell that begins it.
    prefix = ["env", *(f"{name}={value}" for name, value in more.items())]
    process = subprocess.Popen(
        [*prefix, "sh", "-c", job.command], cwd=folder, env=environment(), stdout=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds, cpu = time.monotonic() - began, used.ru_utime + used.ru_stime
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, job.command)
    return seconds, cpu + (process_cpu(daemon) - before if how != BARE else 0.0)


def _measure(job: Application, rounds: int, memories: list[str]) -> dict[str, list[Run]]:
    ways = [BARE, *memories]
    runs: dict[str, list[Run]] = {how: [] for how in ways}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        folder.chmod(0o755)  # for jobs of other users
        work = folder / "work"
        work.mkdir()
        with service(folder) as socket:
            daemon = who_listens(socket)
            subprocess.run(
                ["sh", "-e", "-c", job.prepare], cwd=work, env=environment(), check=True, stderr=subprocess.DEVNULL
            )
            _run(job, work, BARE, socket, daemon)  # what it reads is then in the page cache
            for turn in range(rounds):
                for how in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
                    runs[how].append(_run(job, work, how, socket, daemon))
    return runs


def _more(runs: dict[str, list[Run]], how: str, which: int) -> tuple[float, float]:
    """How much more than bare: the median, and half of the distance between the quartiles."""
    ratios = [run[which] / bare[which] - 1 for bare, run in zip(runs[BARE], runs[how], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return median, (high - low) / 2


def _cells(runs: dict[str, list[Run]], how: str) -> list[str]:
    return ["{:+.1%} ± {:.1%}".format(*_more(runs, how, which)) for which in (0, 1)]


def main() -> None:
    args = arguments(__doc__, 7)
    memories = args.memory.split(",")
    rows: dict[str, Any] = {}
    table_line(["", "bare: s, of CPU", *(f"`{how}`: {what}" for how in memories for what in ("time", "CPU"))])
    table_line(["---"] * (2 + 2 * len(memories)))
    for job in chosen(JOBS, args.only):
        if missing := job.missing():
            table_line([job.name, f"not run: {missing} is not installed", *[""] * (2 * len(memories))])
            continue
        runs = rows[job.name] = _measure(job, args.rounds, memories)
        bare = ", ".join(f"{statistics.median(run[which] for run in runs[BARE]):.2f}" for which in (0, 1))
        table_line([job.name, bare, *(cell for how in memories for cell in _cells(runs, how))])
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
