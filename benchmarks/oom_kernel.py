"""Does an unmerge of what the kernel merged wake the OOM killer? samepage's and the kernel's own, in the same cgroup.

    python -m benchmarks.oom_kernel [--rounds N] [--kernel-rounds N] [--in-process] [--json FILE]

Needs root, for memory cgroups of either version and for /sys/kernel/mm/ksm, which is put back as it was.

The cgroup, its two processes and their neighbours are those of oom.py, but it is ksmd that merged them. One of the two
is unmerged, again and again, by `samepage unmerge --engine kernel`. After each tenth time ksmd merges again what was
copied. Every time it must fail with ENOMEM and its numbers, and nobody may be killed; all data must be intact; and
when the limit is raised, the next call must finish.

Then 2 is written to /sys/kernel/mm/ksm/run, in the same cgroup with new processes for each round.
"""

from __future__ import annotations

import argparse
import errno
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from benchmarks import kernel_ksm
from benchmarks.memory_cgroup import MemoryCgroup
from benchmarks.oom import (
    MIB,
    PAGE_SIZE,
    SIZES,
    Answer,
    Outcome,
    Sizes,
    Worker,
    merged_by_the_kernel,
    show,
    unmerge_in_turn,
)
from benchmarks.processes import environment, wait_until
from samepage.kernel.engine import KernelEngine
from samepage.kernel.settings import Settings

AGAIN = 10
RESERVE = 16 * MIB
PASSES = 2
"""In the first ksmd looks, and in the second it merges."""

Unmerge = Callable[[Worker], Answer]


def by_the_command(worker: Worker) -> Answer:
    command = [sys.executable, "-m", "samepage", "unmerge", "--engine", "kernel", "--pid", str(worker.pid), "--json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    if not done.stdout:
        return {"errno": done.stderr}
    answer: Answer = json.loads(done.stdout)
    return answer | {"status": done.returncode, "said": done.stderr}


def in_process(worker: Worker) -> Answer:
    """What the command does, where to start one takes too long."""
    return KernelEngine(RESERVE, Settings()).unmerge([worker.pid], lambda _: None, lambda: False)


def is_refused(answer: Answer) -> bool:
    """ENOMEM, with numbers that say why."""
    if answer["errno"] != "ENOMEM":
        return False
    return bool(answer["bytes_needed"] == answer["pages_remaining"] * PAGE_SIZE > answer["bytes_available"])


def merge_again() -> None:
    until = kernel_ksm.read("full_scans") + PASSES
    kernel_ksm.write("run", 1)
    wait_until(lambda: kernel_ksm.read("full_scans") >= until, "merged again")
    kernel_ksm.write("run", 0)


def merge_every_tenth_time(i: int) -> None:
    if i % AGAIN == 0:
        merge_again()


def under_a_limit(rounds: int, unmerge: Unmerge, sizes: Sizes = SIZES) -> Outcome:
    """Unmerge again and again in a cgroup that is too small for it."""
    out = Outcome("samepage unmerge --engine kernel")
    with MemoryCgroup("oom") as group, merged_by_the_kernel(group, sizes) as (workers, neighbours):
        unmerge_in_turn(out, group, workers, neighbours, rounds, unmerge, is_refused, merge_every_tenth_time)
    return out


def by_the_kernel(rounds: int, sizes: Sizes = SIZES) -> tuple[Outcome, int]:
    """The kernel's own way, and in how many of the rounds it killed."""
    out, deadly = Outcome("kernel run 2"), 0
    started = time.monotonic()
    for _ in range(rounds):
        with MemoryCgroup("ksm") as group, merged_by_the_kernel(group, sizes) as (_, neighbours):
            try:
                kernel_ksm.write("run", 2)
            except OSError as e:
                out.enomem += e.errno == errno.ENOMEM
                out.other.append(str(e))
            neighbours.look()
            out.rounds += 1
            out.times_full += neighbours.filled
            out.refused += group.refused()
            out.killed += group.killed()
            deadly += group.killed() > 0
    out.seconds = time.monotonic() - started
    return out, deadly


def is_good(out: Outcome) -> bool:
    return out.enomem == out.rounds > 0 and not out.killed and out.intact and out.finished_when_raised


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--kernel-rounds", type=int, default=20)
    parser.add_argument("--in-process", action="store_true", help="without a new process for each unmerge")
    for field, of in (("worker", "one process"), ("part", "what it has again and again"), ("limit", "the cgroup")):
        parser.add_argument(f"--{field}", type=int, metavar="MIB", default=getattr(SIZES, field), help=f"of {of}")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # everything is put back
    sizes = Sizes(args.worker, args.part, args.limit)
    ours = under_a_limit(args.rounds, in_process if args.in_process else by_the_command, sizes)
    show(ours)
    kernels, deadly = by_the_kernel(args.kernel_rounds, sizes)
    show(kernels)
    print(f"    killed in {deadly} of {kernels.rounds}; {ours.pages_unmerged} pages were copied by samepage")
    if args.json:
        args.json.write_text(json.dumps([asdict(ours), asdict(kernels) | {"deadly": deadly}], indent=1) + "\n")
    return 0 if is_good(ours) else 1


if __name__ == "__main__":
    sys.exit(main())
