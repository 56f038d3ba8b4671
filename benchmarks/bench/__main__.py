"""Measure samepage, the kernel's KSM, and what people write by hand, beside one another on the same bytes.

    python -m benchmarks.bench [--quick] [--repeats N] [--json FILE] [--plot FILE] [EXPERIMENT]...

Prints a table: medians of the repeats, in which the sides take turns, so that a busy machine hits all of them. The
kernel's KSM needs root, and is put back as it was; what cannot be measured here is said, with the reason. What the
experiments and the rows are is in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import kernel_ksm
from benchmarks.bench import crowd, disturbances, growth, measures, meters, mixed, neighbour, pacing, report
from benchmarks.bench.measures import MIB, Bench, Record, Skipped
from benchmarks.bench.sizes import FULL, QUICK, Sizes


def machine() -> dict[str, Any]:
    """What it was measured on."""
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    knobs = {p.name: p.read_text().strip() for p in kernel_ksm.KSM.glob("*") if p.stat().st_mode & 0o200}
    return {
        "cpu": model[0].partition(": ")[2] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // MIB,
        "memory_available_mib": meters.available() // MIB,
        "transparent_hugepage": Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().strip(),
        "max_map_count": int(Path("/proc/sys/vm/max_map_count").read_text()),
        "ksm": knobs,
        "load_average_before": os.getloadavg(),
        "python": platform.python_version(),
        "samepage": version("samepage"),
        "root": os.geteuid() == 0,
        "realtime": os.sched_getscheduler(0) == os.SCHED_RR,
    }


MODULES = (measures, growth, crowd, mixed, disturbances, neighbour, pacing)
EXPERIMENTS = {name: run for module in MODULES for name, run in module.EXPERIMENTS.items()}


def measure(bench: Bench, names: list[str]) -> list[Record]:
    """Do experiments; their records. One that breaks off does not keep others from being done: see `Bench.failed`."""
    records: list[Record] = []
    for name in names:
        try:
            for record in EXPERIMENTS[name](bench):
                records.append(record)  # one by one: what was there before it failed is kept
        except Skipped as why:
            bench.skip(name, str(why))
        except (
            EOFError,
            OSError,
            subprocess.SubprocessError,
        ) as why:  # a worker was killed, nothing was merged in time
            bench.failed[name] = str(why)
    return records


def run(names: list[str], sizes: Sizes, repeats: int, console: Console) -> tuple[list[Record], Bench]:
    """Do experiments; the records, and what was skipped, or failed, why."""
    started = time.monotonic()
    bench = Bench(sizes, repeats, lambda line: console.print(f"{time.monotonic() - started:5.0f} s  {line}"))
    return measure(bench, names), bench


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sizes and one repeat: whether it works, in a minute"
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="of every measurement (default: 5; with --quick 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every record, the rows, and the machine")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the figure (.svg or .png; needs matplotlib)")
    parser.add_argument(
        "--realtime",
        action="store_true",
        help="run all that is measured, ksmd too, before any other work on a busy machine (SCHED_RR; needs root)",
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as docs/benchmarks.md has it")
    parser.add_argument(
        "experiments", metavar="EXPERIMENT", nargs="*", help=f"of {', '.join(EXPERIMENTS)} (default: all)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if unknown := [name for name in args.experiments if name not in EXPERIMENTS]:
        parser.error(f"no experiment {unknown[0]}; there are {', '.join(EXPERIMENTS)}")
    if args.repeats is not None and args.repeats < 1:
        parser.error("--repeats must be at least 1")
    if args.plot and not find_spec("matplotlib"):
        parser.error("--plot needs matplotlib: pip install 'samepage[bench]'")
    if args.realtime:
        try:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        except PermissionError:
            parser.error("--realtime needs root")
    # Ended by a signal, everything is put back too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    facts = machine()
    progress = Console(stderr=True, highlight=False, soft_wrap=True)
    sizes = QUICK if args.quick else FULL
    repeats = args.repeats or (1 if args.quick else 5)
    try:
        records, bench = run(args.experiments or list(EXPERIMENTS), sizes, repeats, progress)
    except KeyboardInterrupt:
        return 130
    rows = report.rows(records)
    if args.json:
        whole = {
            "machine": facts | {"load_average_after": os.getloadavg()},
            "repeats": repeats,
            "sizes": dataclasses.asdict(sizes),
            "skipped": bench.skipped,
            "failed": bench.failed,
            "rows": [dataclasses.asdict(row) for row in rows],
            "records": records,
        }
        args.json.write_text(json.dumps(whole) + "\n")
    if args.plot:
        from benchmarks.bench.plot import plot

        plot(records, rows, args.plot)
    if args.markdown:
        print(report.markdown(rows))
    else:
        console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
        console.print(report.table(rows))
    for what, why in bench.skipped.items():
        print(f"skipped: {what}: {why}")
    for what, why in bench.failed.items():
        print(f"bench: {what} failed: {why}", file=sys.stderr)
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
