"""Does `samepage scan` say beforehand what merging then comes to?

    python -m benchmarks.scan [--mebibytes N] [--rounds N] [--json FILE]
    python -m benchmarks.scan --speed

Needs root, for /sys/kernel/mm/ksm, which is put back as it was; and sqlite3, git and gcc.

The programs of scan_workload.py are stopped in the middle of their work, and looked at. Then the kernel's KSM is let
loose on the same memory, until two passes of it change nothing more: its pages_shared and pages_sharing are compared
with what was predicted. For samepage's own saving the same programs are started again under `samepage run`.

--speed looks at processes of 2 GiB (small pages, huge pages) and says how fast that went, for each second of CPU time
that it took, and how much memory it needed for each page.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import kernel_ksm, scan_workload

MIB = 1 << 20
PAGE_SIZE = os.sysconf("SC_PAGESIZE")
COUNTERS = ("pages_shared", "pages_sharing", "ksm_zero_pages")
SETTLE_SECONDS = 3.0
"""How long the programs work before they are stopped."""

PATIENCE = 300.0


def scan(*arguments: object) -> dict[str, Any]:
    """The report of `samepage scan`."""
    command = [sys.executable, "-m", "samepage", "scan", "--json", "-", *map(str, arguments)]
    report: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return report


def let_ksm_loose() -> dict[str, int]:
    """Its counters when two passes have changed nothing more."""
    kernel_ksm.write("run", 1)
    deadline, before, unchanged = time.monotonic() + PATIENCE, None, 0
    passes = kernel_ksm.read("full_scans")
    while unchanged < 2:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the kernel's KSM did not come to an end in {PATIENCE:.0f} s")
        time.sleep(0.05)
        if kernel_ksm.read("full_scans") < passes + 2:
            continue
        passes = kernel_ksm.read("full_scans")
        now = {name: kernel_ksm.read(name) for name in (*COUNTERS, "pages_volatile")}
        unchanged = unchanged + 1 if now == before else 0
        before = now
    assert before is not None
    return before


def compare_with_ksm(mebibytes: int, **knobs: int) -> dict[str, dict[str, int]]:
    """What was predicted and what came of it, by counter. `scan_workload.Missing`."""
    # Nobody else's pages may be merged meanwhile, nor these before they were looked at.
    borrowed = kernel_ksm.borrowed(**(kernel_ksm.FASTEST | {"smart_scan": 0, "run": 2} | knobs))
    with tempfile.TemporaryDirectory() as directory, borrowed:
        kernel_ksm.write("run", 0)
        with scan_workload.running(Path(directory), mebibytes, mergeable=True) as workload:
            time.sleep(SETTLE_SECONDS)
            report = scan(*workload.stop())
            reached = let_ksm_loose()
    return {name: {"predicted": report["by_page"][name], "reached": reached[name]} for name in COUNTERS}


def compare_with_samepage(mebibytes: int) -> dict[str, dict[str, int]]:
    """Bytes that `samepage run` was predicted to save, of the programs as they run without it and then with it (not
    merging yet), and bytes of PSS that went when it merged. All of the programs that stay as they are: gcc and git
    come and go."""
    with tempfile.TemporaryDirectory() as directory:
        with scan_workload.running(Path(directory), mebibytes) as workload:
            time.sleep(SETTLE_SECONDS)
            workload.stop()
            plain = scan(*workload.steady)["samepage_run"]
        command = [sys.executable, "-m", "samepage", "run", "--set", "run=0", "--"]
        command += [sys.executable, "-m", "benchmarks.scan", "--hold", directory, "--mebibytes", str(mebibytes)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdin is not None
            assert holder.stdout is not None
            pids = json.loads(holder.stdout.readline())
            time.sleep(SETTLE_SECONDS)
            beneath = scan(*pids)["samepage_run"]
            before = pss(pids)
            print("merge", file=holder.stdin, flush=True)
            reached = before - _settled(pids)
            holder.stdin.close()  # it ends everything
    return {
        "saved_bytes, from outside": {"predicted": plain["saved_bytes"], "reached": reached},
        "saved_bytes, under samepage": {"predicted": beneath["saved_bytes"], "reached": reached},
    }


def pss(pids: list[int]) -> int:
    """Bytes of memory of these processes, what they share counted once."""
    rollups = (Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids)
    return sum(int(rollup.partition("\nPss:")[2].split(None, 1)[0]) * 1024 for rollup in rollups)


def _settled(pids: list[int]) -> int:
    """Their PSS when it has not changed by a thousandth for ten seconds."""
    deadline, since, value = time.monotonic() + PATIENCE, time.monotonic(), pss(pids)
    while time.monotonic() - since < 10:
        if time.monotonic() > deadline:
            raise RuntimeError("samepage did not come to an end")
        time.sleep(0.5)
        now = pss(pids)
        if abs(now - value) > value / 1000:
            since, value = time.monotonic(), now
    return pss(pids)


def _hold(directory: Path, mebibytes: int) -> None:
    """Run the programs until stdin is closed; "merge" on it switches merging on."""
    below = directory / "held"
    below.mkdir()
    with scan_workload.running(below, mebibytes) as workload:
        print(json.dumps(workload.steady), flush=True)
        for line in sys.stdin:
            if line == "merge\n":
                subprocess.run([sys.executable, "-m", "samepage", "set", "run", "1"], check=True)


# -- speed --------------------------------------------------------------------------------------------------------

FILLED = """
import ctypes, mmap, sys, time
import numpy as np
memory = mmap.mmap(-1, int(sys.argv[1]) << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE if sys.argv[2] == "huge" else mmap.MADV_NOHUGEPAGE)
words = np.frombuffer(memory, np.uint64)
for at in range(0, len(words), 1 << 20):
    words[at : at + (1 << 20)] = np.arange(at, at + (1 << 20), dtype=np.uint64) % (len(words) // 4 * 3)
print("ready", flush=True)
time.sleep(3600)
"""


def speed(mebibytes: int) -> dict[str, dict[str, float]]:
    """For small and huge pages: GiB/s for each second of CPU time, and bytes of memory for each page."""
    outcome = {}
    nothing = _peak_of_a_scan(os.getpid())[1]
    for kind in ("small", "huge"):
        process = subprocess.Popen(
            [sys.executable, "-c", FILLED, str(mebibytes), kind], stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            process.stdout.readline()
            report, peak = _peak_of_a_scan(process.pid)
        finally:
            process.kill()
            process.communicate()
        look = report["look"]
        outcome[kind] = {
            "gib_per_cpu_second": look["bytes_read"] / look["cpu_seconds"] / 2**30,
            "gib_per_second": look["bytes_read"] / look["seconds"] / 2**30,
            "bytes_per_page": (peak - nothing) / report["pages"]["total"],
        }
    return outcome


def _peak_of_a_scan(pid: int) -> tuple[dict[str, Any], int]:
    """The report of a scan, and the most memory it had resident, in bytes."""
    program = (
        "import resource, sys; from samepage.commands import main; status = main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(status)"
    )
    command = [sys.executable, "-c", program, "scan", "--json", "-", str(pid)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout), int(done.stderr.splitlines()[-1]) * 1024


def _show(name: str, figures: dict[str, int]) -> float:
    predicted, reached = figures["predicted"], figures["reached"]
    off = abs(predicted - reached) / reached if reached else float(predicted > 0)
    print(f"{name:>28}: predicted {predicted:>12,}  reached {reached:>12,}  off by {off:.2%}", flush=True)
    return off


def main() -> int:
    """Exit status: 0 when KSM's counters were predicted within 1 % and samepage's saving within 3 %, else 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mebibytes", type=int, default=64, help="of a numpy worker's arrays, each (default: 64)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--hold", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.hold:
        _hold(args.hold, args.mebibytes)
        return 0
    if args.speed:
        for kind, figures in speed(2048).items():
            print(kind, ", ".join(f"{name} {value:.2f}" for name, value in figures.items()))
        return 0
    good, outcome = True, []
    try:
        for n in range(args.rounds):
            knobs = ({}, {"use_zero_pages": 1}, {"max_page_sharing": 16})[n % 3]
            print(f"the kernel's KSM, {knobs or 'as it is'}")
            ksm = compare_with_ksm(args.mebibytes, **knobs)
            good &= max(_show(name, figures) for name, figures in ksm.items()) <= 0.01
            outcome.append({"knobs": knobs} | ksm)
        print("samepage run")
        own = compare_with_samepage(args.mebibytes)
        good &= max(_show(name, figures) for name, figures in own.items()) <= 0.03
        outcome.append(own)
    except scan_workload.Missing as e:
        print(f"scan: {e}", file=sys.stderr)
        return 1
    if args.json:
        args.json.write_text(json.dumps(outcome, indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
