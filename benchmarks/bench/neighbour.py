"""What a server's clients notice when its memory is merged with a second copy's: before, while merging goes on, and
once all is merged."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.bench import meters, sides
from benchmarks.bench.disturbances import kept_to, merge_again
from benchmarks.bench.measures import MIB, Bench, Record, Skipped, compiled
from benchmarks.bench.servers import KINDS, MERGEABLE
from benchmarks.bench.sides import Side
from benchmarks.processes import Commanded, wait_until

REPEATS = 3
"""At most: each takes more than a minute."""


def neighbour(bench: Bench) -> Iterator[Record]:
    """With a free core, the server and its client have one core, and all that merges the other. Without, the server
    shares its core with all that merges, and the client has the other."""
    cpus = sorted(os.sched_getaffinity(0))[:2]
    if len(cpus) < 2:
        raise Skipped("needs two CPUs")
    with tempfile.TemporaryDirectory(prefix="samepage-bench-") as folder:
        library = compiled("client.c", Path(folder) / "client.so", "-shared", "-fPIC")
        for repeat in range(min(bench.repeats, REPEATS)):
            for kind in KINDS:
                if kind == "redis" and not shutil.which("redis-server"):
                    bench.skip("redis beside merging", "needs redis-server")
                    continue
                for free in (True, False):
                    for make in (Side, *bench.both()):
                        record = {"experiment": "neighbour", "repeat": repeat, "kind": kind, "free_core": free}
                        record |= _served(
                            bench, make(), kind, library, (cpus[0], cpus[1 if free else 0], cpus[not free])
                        )
                        _say(bench, record)
                        yield record


def _say(bench: Bench, record: Record) -> None:
    where = "a free core" if record["free_core"] else "no free core"
    longest = ", ".join(f"{record[when]['longest_us'] / 1000:.1f}" for when in ("before", "merging", "merged"))
    bench.say(
        f"{record['kind']}, {where}, {record['side']}, {record['repeat'] + 1}: longest before, while merging, merged "
        f"{longest} ms"
    )


def _served(bench: Bench, side: Side, kind: str, library: str, cpus: tuple[int, int, int]) -> Record:
    """Two servers, a client of the first: its answers' times in three situations. The CPUs are the server's, the
    merger's and the client's."""
    mib = bench.sizes.served
    server_cpu, merger_cpu, client_cpu = cpus
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="samepage-bench-"))
        stack.enter_context(sides.switches(bench.say))
        group = stack.enter_context(bench.group())
        stack.enter_context(side)
        paths = [f"{folder}/server{i}" for i in (1, 2)]
        module = [sys.executable, "-m", "benchmarks.bench.servers"]
        more = {"SAMEPAGE_MEMORY": "mapped", "NUMPY_MADVISE_HUGEPAGE": "0", "OPENBLAS_NUM_THREADS": "1"}
        if isinstance(side, sides.Kernel):
            more[MERGEABLE] = "1"
        first, _ = side.start_programs([[*module, kind, path, str(mib)] for path in paths], group, **more)
        if side.socket:
            side.register()
        client = Commanded([*module, "client", paths[0], str(mib), kind, library])
        stack.callback(client.end)
        client.answer()
        threads = [int(task.name) for task in Path(f"/proc/{first.pid}/task").iterdir()]
        mergers = side.busy()
        stack.enter_context(kept_to({server_cpu}, [i for i in threads if i not in mergers]))
        stack.enter_context(kept_to({merger_cpu}, mergers))
        stack.enter_context(kept_to({client_cpu}, [int(t.name) for t in Path(f"/proc/{client.pid}/task").iterdir()]))
        return _three_times(bench, side, meters.Memory(group, side.pids()), client)


def _three_times(bench: Bench, side: Side, memory: meters.Memory, client: Commanded) -> Record:
    def recorded(seconds: float) -> Any:
        client.ask("record", True)
        time.sleep(seconds)
        client.ask("record", False)
        return client.ask("take")

    goal = bench.sizes.served * MIB
    recorded(0.5)  # the first questions of all
    found: Record = {"side": side.name, "before": recorded(bench.sizes.merging)}
    found["merging_seconds"] = merge_again(bench, side, memory, goal, partial(client.ask, "record"))
    found["merging"] = client.ask("take")
    before = memory.used()
    side.run(1)
    if type(side) is not Side:
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: before - memory.used() >= 0.75 * goal, "merged", 10, memory.every)
    time.sleep(bench.sizes.merging)
    return found | {"saved": before - memory.used(), "merged": recorded(bench.sizes.merging)}


EXPERIMENTS: dict[str, Callable[[Bench], Iterator[Record]]] = {"neighbour": neighbour}
