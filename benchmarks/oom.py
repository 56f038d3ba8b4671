"""Does an unmerge wake the OOM killer? samepage's and the kernel's, in the same memory cgroup, side by side.

    python -m benchmarks.oom [--rounds N] [--kernel-rounds N] [--json FILE]
    python -m benchmarks.oom --speed

Needs root, for memory cgroups and for /sys/kernel/mm/ksm, which is put back as it was.

A cgroup of 300 MiB holds two processes of 512 MiB each. Their memory is the same 64 MiB sixteen times over, so that,
merged, it takes 64 MiB; which are charged to this cgroup, for who donates a segment is in it. (A segment given by
somebody outside would be charged there, and leave more room here.) Two neighbours fill what is left of the cgroup
almost up to the limit and free it again, hundreds of times a second; alone they never go over it. Then one of the
two processes is unmerged, which would need 512 MiB, again and again by each surface, while ksmd merges again what
was unmerged. Every time it must fail with ENOMEM and its numbers, and nobody may be killed; all data must be intact;
and when the limit is raised, the next call must finish.

The kernel's own MADV_UNMERGEABLE is done to the same processes in the same cgroup with the same neighbours, in fewer
rounds, because each takes new processes and a merge by ksmd.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import kernel_ksm
from benchmarks.memory_cgroup import MemoryCgroup
from benchmarks.processes import Commanded, environment, service, wait_until
from samepage.service.control import Client

MIB = 1 << 20
PAGE_SIZE = os.sysconf("SC_PAGESIZE")
PROCESS = str(Path(__file__).with_name("oom_process.py"))
LIMIT = 300 * MIB
ROOMY = 4096 * MIB
WORKER_MIB, PART_MIB = 512, 64
PAGES = WORKER_MIB * MIB // PAGE_SIZE

Answer = dict[str, Any]


class Worker(Commanded):
    """A worker of oom_process.py, ready; in a cgroup, and under the agent if `socket` is a service's."""

    def __init__(self, group: MemoryCgroup | None, socket: str | None, mib: int = WORKER_MIB, part: int = PART_MIB):
        super().__init__([sys.executable, PROCESS, "worker", str(mib), str(part)], group, socket)
        self.pages = mib * MIB // PAGE_SIZE
        self.answer()


class Neighbours:
    """Processes that fill the cgroup and empty it."""

    def __init__(self, group: MemoryCgroup, count: int = 2) -> None:
        command = [*group.enter(), sys.executable, PROCESS, "neighbour", str(group.path)]
        self.processes = [subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE) for _ in range(count)]
        self.filled = 0
        """Times the cgroup was full, as of the last `look`."""

    def look(self) -> None:
        """Take note of what they did. Must be called now and then."""
        for process in self.processes:
            assert process.stdout is not None
            os.set_blocking(process.stdout.fileno(), False)
            with contextlib.suppress(BlockingIOError):
                self.filled += len(os.read(process.stdout.fileno(), 1 << 20))

    def wait_full(self, seconds: float = 2.0) -> None:
        """Until they filled it once more."""
        before, deadline = self.filled, time.monotonic() + seconds
        while self.filled == before and time.monotonic() < deadline:
            time.sleep(0.002)
            self.look()

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def samepage(socket: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command."""
    command = [sys.executable, "-m", "samepage", *arguments, "--socket", socket]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)


def rows(socket: str) -> dict[int, Answer]:
    """`samepage status`, by pid."""
    with Client(socket) as client:
        return {row["pid"]: row for row in client.ask("status").get("processes", [])}


def wait_merged(socket: str, workers: list[Worker], share: float = 0.99) -> None:
    """Until so much of each worker's memory is merged."""

    def merged() -> bool:
        found = rows(socket)
        return all(w.pid in found and found[w.pid]["merged"] >= share * w.pages for w in workers)

    wait_until(merged, "merged")


# ---- the surfaces ----------------------------------------------------------------------------------------------------


def by_region(worker: Worker, socket: str) -> Answer:
    answer: Answer = worker.ask("region")
    return answer


def by_madvise(worker: Worker, socket: str) -> Answer:
    answer: Answer = worker.ask("madvise")
    return answer


def by_unmerge(worker: Worker, socket: str) -> Answer:
    done = samepage(socket, "unmerge", "--pid", str(worker.pid), "--json")
    answer: Answer = json.loads(done.stdout)
    return answer | {"status": done.returncode, "said": done.stderr}


def by_run_2(worker: Worker, socket: str) -> Answer:
    with Client(socket, timeout=None) as client:
        client.ask("set", knob="run", value="1")
    done = samepage(socket, "set", "run", "2")
    answer: Answer = {"errno": None, "status": done.returncode, "said": done.stderr}
    if done.returncode:
        answer["errno"] = "ENOMEM" if "Cannot allocate memory" in done.stderr else done.stderr
        with Client(socket, timeout=None) as client:
            answer["run"] = client.ask("get", knob="run")["knobs"]["run"]
    return answer


SURFACES: dict[str, tuple[str, Callable[[Worker, str], Answer]]] = {
    "Region.unmerge": ("register", by_region),
    "madvise": ("advise", by_madvise),
    "samepage unmerge": ("advise", by_unmerge),
    "samepage set run 2": ("advise", by_run_2),
}


@dataclass
class Outcome:
    """What came of one surface. Counts are of rounds, but for `killed` (processes) and `pages_unmerged`."""

    surface: str
    rounds: int = 0
    enomem: int = 0
    other: list[str] = field(default_factory=list)
    killed: int = 0
    intact: bool = True
    finished_when_raised: bool = False
    pages_unmerged: int = 0
    """By all calls together that tell; more than there are, for ksmd merges them again."""
    times_full: int = 0
    """How often the neighbours filled the cgroup meanwhile."""
    refused: int = 0
    """How often the kernel refused memory, and had to reclaim, or the unmerge to give up."""
    seconds: float = 0.0


def is_refused(answer: Answer) -> bool:
    return bool(answer["errno"] == "ENOMEM")


def unmerge_in_turn(
    out: Outcome,
    group: MemoryCgroup,
    workers: list[Worker],
    neighbours: Neighbours,
    rounds: int,
    unmerge: Callable[[Worker], Answer],
    refused: Callable[[Answer], bool] = is_refused,
    first: Callable[[int], None] = lambda _: None,
) -> None:
    """Unmerge one worker after the other while the neighbours fill the cgroup, then both when its limit is raised.
    `first` is called before each round, with its number."""
    before, started = group.refused(), time.monotonic()
    try:
        for i in range(rounds):
            first(i)
            answer = unmerge(workers[i % 2])
            out.rounds += 1
            out.enomem += refused(answer)
            out.other += [] if refused(answer) else [str(answer)]
            out.pages_unmerged += answer.get("pages_unmerged", 0)
            neighbours.wait_full()
            if i % 50 == 49:
                out.intact &= all(worker.ask("verify") for worker in workers)
    except EOFError as e:
        out.other.append(str(e))
    out.seconds = time.monotonic() - started
    neighbours.look()
    out.times_full, out.refused, out.killed = neighbours.filled, group.refused() - before, group.killed()
    neighbours.end()
    if not out.killed:
        group.set_limit(ROOMY)
        out.finished_when_raised = all(unmerge(worker)["errno"] is None for worker in workers)
        out.intact &= all(worker.ask("verify") for worker in workers)
        out.killed = group.killed()


def under_a_limit(surface: str, rounds: int, folder: Path, reserve: int = 16 * MIB) -> Outcome:
    """Unmerge by one surface again and again in a cgroup that is too small for it."""
    how, unmerge = SURFACES[surface]
    out = Outcome(surface)
    with contextlib.ExitStack() as stack:
        socket = stack.enter_context(service(folder, "--reserve", str(reserve)))
        group = stack.enter_context(MemoryCgroup("oom", ROOMY))
        workers = [Worker(group, socket) for _ in range(2)]
        for worker in workers:
            stack.callback(worker.end)
            worker.ask(how)
        wait_merged(socket, workers)
        for worker in workers:
            for page in range(0, PAGES, PAGES // 16):
                worker.ask("write", page)
        group.set_limit(LIMIT)
        neighbours = Neighbours(group)
        stack.callback(neighbours.end)
        unmerge_in_turn(out, group, workers, neighbours, rounds, lambda worker: unmerge(worker, socket))
    return out


# ---- the kernel ------------------------------------------------------------------------------------------------------


def wait_kernel_merged(workers: list[Worker]) -> None:
    """Until the kernel has merged nearly all memory of each."""

    def merged() -> bool:
        return all(kernel_ksm.merging_pages(w.pid) >= 0.99 * w.pages for w in workers)

    wait_until(merged, "merged by the kernel")


@dataclass(frozen=True)
class Sizes:
    """MiB: of a worker, of what it has again and again, and of the cgroup of two of them."""

    worker: int = WORKER_MIB
    part: int = PART_MIB
    limit: int = LIMIT // MIB


SIZES = Sizes()


@contextlib.contextmanager
def merged_by_the_kernel(group: MemoryCgroup, sizes: Sizes = SIZES) -> Iterator[tuple[list[Worker], Neighbours]]:
    """Two workers, merged by the kernel, in a cgroup that is too small for one, and that neighbours fill and empty."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(kernel_ksm.borrowed(**kernel_ksm.FASTEST))
        group.set_limit(ROOMY)
        workers = [Worker(group, None, sizes.worker, sizes.part) for _ in range(2)]
        for worker in workers:
            stack.callback(worker.end)
            worker.ask("advise")
        wait_kernel_merged(workers)
        kernel_ksm.write("run", 0)
        group.set_limit(sizes.limit * MIB)
        neighbours = Neighbours(group)
        stack.callback(neighbours.end)
        yield workers, neighbours


def kernel_under_a_limit(rounds: int) -> Outcome:
    """The same with the kernel's MADV_UNMERGEABLE, and new processes for every round."""
    out = Outcome("kernel madvise")
    started = time.monotonic()
    for _ in range(rounds):
        with contextlib.ExitStack() as stack:
            group = stack.enter_context(MemoryCgroup("ksm"))
            workers, neighbours = stack.enter_context(merged_by_the_kernel(group))
            refused = group.refused()
            try:
                answer = workers[0].ask("madvise")
                out.enomem += answer["errno"] == "ENOMEM"
                out.other += [] if answer["errno"] == "ENOMEM" else [str(answer["errno"])]
            except EOFError as e:
                out.other.append(str(e))
            out.rounds += 1
            out.refused += group.refused() - refused
            neighbours.look()
            out.times_full += neighbours.filled
            out.killed += group.killed()
    out.seconds = time.monotonic() - started
    return out


# ---- being interrupted -----------------------------------------------------------------------------------------------


def anonymous(pid: int) -> int:
    """Bytes of private copies a process has."""
    found = re.search(r"^RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def interrupts(rounds: int, folder: Path) -> list[float]:
    """Seconds from a Ctrl-C in the middle of `samepage unmerge` to the line that says where it stands."""
    seconds: list[float] = []
    with contextlib.ExitStack() as stack:
        socket = stack.enter_context(service(folder))
        workers = [Worker(None, socket) for _ in range(2)]
        for worker in workers:
            stack.callback(worker.end)
            worker.ask("advise")
        command = [sys.executable, "-m", "samepage", "unmerge", "--socket", socket, "--pid", str(workers[0].pid)]
        while len(seconds) < rounds:
            samepage(socket, "set", "run", "2")  # looks at everything afresh
            samepage(socket, "set", "run", "1")
            wait_merged(socket, workers)
            samepage(socket, "set", "run", "0")
            before = anonymous(workers[0].pid)
            with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as unmerge:
                while anonymous(workers[0].pid) < before + 8 * MIB and unmerge.poll() is None:
                    pass
                started = time.perf_counter()
                unmerge.send_signal(signal.SIGINT)
                assert unmerge.stderr is not None
                if "interrupted" in unmerge.stderr.readline():
                    seconds.append(time.perf_counter() - started)
        assert all(worker.ask("verify") for worker in workers)
    return sorted(seconds)


# ---- speed -----------------------------------------------------------------------------------------------------------


@dataclass
class Speed:
    """Seconds to unmerge `mib` MiB with memory enough: by samepage's `run` = 2, and the kernel's."""

    mib: int
    samepage: list[float]
    kernel: list[float]

    @property
    def ratio(self) -> float:
        """Of the best of each: 1.0 is as fast as the kernel."""
        return min(self.kernel) / min(self.samepage)


def speed(repeats: int, folder: Path, mib: int = 1024) -> Speed:
    """Two processes with the same `mib` / 2 MiB."""
    found = Speed(mib, [], [])
    for _ in range(repeats):
        with contextlib.ExitStack() as stack:
            socket = stack.enter_context(service(folder))
            workers = [Worker(None, socket, mib // 2, mib // 2) for _ in range(2)]
            for worker in workers:
                stack.callback(worker.end)
                worker.ask("advise")
            wait_merged(socket, workers)
            with Client(socket, timeout=None) as client:
                started = time.perf_counter()
                client.ask("set", knob="run", value="2")
                found.samepage.append(time.perf_counter() - started)
            assert all(worker.ask("verify") for worker in workers)
        with contextlib.ExitStack() as stack:
            stack.enter_context(kernel_ksm.borrowed(**kernel_ksm.FASTEST))
            workers = [Worker(None, None, mib // 2, mib // 2) for _ in range(2)]
            for worker in workers:
                stack.callback(worker.end)
                worker.ask("advise")
            wait_kernel_merged(workers)
            started = time.perf_counter()
            kernel_ksm.write("run", 2)
            found.kernel.append(time.perf_counter() - started)
    return found


# ---- the report ------------------------------------------------------------------------------------------------------


def show(out: Outcome) -> None:
    verdict = f"{out.enomem} of {out.rounds} ENOMEM, {out.killed} processes killed"
    if not out.surface.startswith("kernel"):
        verdict += f", data {'intact' if out.intact else 'LOST'}"
        verdict += f", {'finished' if out.finished_when_raised else 'NOT finished'} once the limit was raised"
    print(f"{out.surface}: {verdict}; {out.times_full} times full, {out.refused} refused, {out.seconds:.0f} s")
    for other in sorted(set(out.other)):
        print(f"    {out.other.count(other)} x {other}")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="unmerges by each surface")
    parser.add_argument("--kernel-rounds", type=int, default=20, help="unmerges by the kernel")
    parser.add_argument("--surface", action="append", choices=SURFACES, help="only this one; may be repeated")
    parser.add_argument("--reserve", type=int, default=16 * MIB, help="of the service, in bytes (default: 16 MiB)")
    parser.add_argument(
        "--speed", action="store_true", help="measure instead how fast 1 GiB is unmerged, and how soon Ctrl-C ends it"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="samepage-oom-") as name:
        folder = Path(name)
        if args.speed:
            found = speed(5, folder)
            for who, seconds in (("samepage", found.samepage), ("kernel", found.kernel)):
                best = found.mib / min(seconds)
                print(f"{who}: run = 2 unmerged {found.mib} MiB in {min(seconds):.3f} s at best ({best:.0f} MiB/s)")
            print(f"samepage at {found.ratio:.2f} of the kernel's speed")
            stops = interrupts(20, folder)
            print(f"Ctrl-C: stopped after {1000 * stops[10]:.0f} ms in the median, {1000 * stops[-1]:.0f} ms at most")
            report: Any = asdict(found) | {"ratio": found.ratio, "interrupts": stops}
            good = found.ratio >= 0.5
        else:
            outcomes = []
            for surface in args.surface or SURFACES:
                outcomes.append(under_a_limit(surface, args.rounds, folder, args.reserve))
                show(outcomes[-1])
            good = all(
                out.enomem == out.rounds and not out.killed and out.intact and out.finished_when_raised
                for out in outcomes
            )
            if args.kernel_rounds:
                outcomes.append(kernel_under_a_limit(args.kernel_rounds))
                show(outcomes[-1])
            report = [asdict(out) for out in outcomes]
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
