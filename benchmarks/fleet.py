"""`python -m benchmarks.fleet [HOSTS...]`: how the questions of `samepage fleet` grow with the hosts.

Records this machine once, makes a fleet of perturbed copies of it (64 GiB a host, 1 % of the contents), and asks of the
first so many of its hosts, each number in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from samepage.fleet import advice, key, queries, schema, synthetic
from samepage.fleet.placement import first_fit, greedy

HOST_BYTES, ROOM = 64 << 30, 96 << 30
MEMORY = 5 << 30


def main() -> None:
    """Make the fleet, and print a line of JSON for each number of hosts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("hosts", type=int, nargs="*", default=[100, 300, 1000])
    parser.add_argument("--fleet", type=Path, help="one that was made before, or where to keep it")
    parser.add_argument("--ask", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="samepage-bench-") as temporary:
        directory = args.fleet or Path(temporary) / "fleet"
        if args.ask:
            print(json.dumps(ask(directory, args.ask, Path(temporary))), flush=True)
            return
        if not directory.exists():
            _make(directory, max(args.hosts), Path(temporary))
        for hosts in args.hosts:
            command = [sys.executable, "-m", "benchmarks.fleet", "--fleet", str(directory), "--ask", str(hosts)]
            subprocess.run(command, check=True)


def _make(directory: Path, hosts: int, temporary: Path) -> None:
    key.make(temporary / "key")
    command = [sys.executable, "-m", "samepage", "record", "--all", "--looks", "1", "-o", str(temporary / "template")]
    subprocess.run([*command, "--key", str(temporary / "key")], check=True)
    synthetic.make(schema.looks([temporary / "template"]), synthetic.Shape(hosts, HOST_BYTES), directory)


def ask(directory: Path, hosts: int, spill: Path) -> dict[str, float]:
    """All questions and a placement, of the first `hosts`."""
    began = time.monotonic()
    looks = queries.latest(schema.looks([directory]))[:hosts]
    fleet = queries.Fleet(queries.duckdb(looks, MEMORY, spill), looks[0].head.fraction)
    answers = fleet.ask()
    asked = time.monotonic()
    problem = advice.problem_of(fleet, answers, ROOM)
    fitted, placed = problem.saved(first_fit(problem)), problem.saved(greedy(problem))
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "hosts": hosts,
        "bytes": sum(path.stat().st_size for look in looks for path in (look.pages, look.mappings)),
        "pages": answers.pages,
        "workloads": len(answers.workloads),
        "seconds_asking": round(asked - began, 1),
        "seconds_placing": round(time.monotonic() - asked, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "memory_gib": round(used.ru_maxrss / 2**20, 2),
        "first_fit_saved": fitted,
        "placement_saved": placed,
        "bound": problem.bound,
    }


if __name__ == "__main__":
    main()
