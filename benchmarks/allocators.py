"""What allocating and freeing costs with libc's malloc, with others, and under samepage with each `--memory`.

    python -m benchmarks.allocators                 # the table: ns of CPU for each step, MiB of memory at most, or left
    python -m benchmarks.allocators --rounds 9 --only glibc,all

`benchmarks/bench/blocks.c` says what the steps are. The sides take turns; the table has the medians. What merging
itself costs is not in it: the program's blocks come and go, and there is but one process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

from benchmarks.applications import LIBRARIES
from benchmarks.apps import MEMORY, table_line
from benchmarks.processes import environment, service
from samepage import agent

SOURCE = Path(__file__).parent / "bench" / "blocks.c"
STEPS = ("one", "some", "written", "small", "growing", "freed")
OTHERS = {
    "jemalloc": LIBRARIES / "libjemalloc.so.2",
    "mimalloc": LIBRARIES / "libmimalloc.so.2",
    "tcmalloc": LIBRARIES / "libtcmalloc_minimal.so.4",
}
SECONDS = 0.5


def _sides(socket: str) -> dict[str, dict[str, str]]:
    """The environment of each."""
    under = {"LD_PRELOAD": str(agent.library_path()), "SAMEPAGE_SOCKET": socket}
    sides: dict[str, dict[str, str]] = {"glibc": {}}
    sides |= {name: {"LD_PRELOAD": str(path)} for name, path in OTHERS.items() if path.exists()}
    return sides | {f"glibc, `{memory}`": under | {"SAMEPAGE_MEMORY": memory} for memory in MEMORY}


def _run(program: Path, step: str, more: dict[str, str]) -> tuple[float, float]:
    """ns for each, and MiB at most; for the last step, when all is freed."""
    command = [str(program), step, str(SECONDS)]
    done = subprocess.run(command, env=environment() | more, stdout=subprocess.PIPE, text=True, check=True)
    ns, kib = done.stdout.split()
    return float(ns), float(kib) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="sides or parts of their names, separated by commas")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        program = folder / "blocks"
        subprocess.run([os.environ.get("CC", "cc"), "-O2", "-fno-builtin", SOURCE, "-o", program], check=True)
        with service(folder) as socket:
            wanted = args.only.split(",")
            sides = {name: more for name, more in _sides(socket).items() if any(part in name for part in wanted)}
            table_line(["ns; MiB at most", *STEPS])
            table_line(["---"] * (len(STEPS) + 1))
            found: dict[tuple[str, str], list[tuple[float, float]]]
            found = {(name, step): [] for name in sides for step in STEPS}
            for _ in range(args.rounds):
                for (name, step), runs in found.items():
                    runs.append(_run(program, step, sides[name]))
            for name in sides:
                medians = [[statistics.median(x) for x in zip(*found[name, step], strict=True)] for step in STEPS]
                table_line([name, *(f"{ns:,.0f}; {mib:.0f}" for ns, mib in medians)])


if __name__ == "__main__":
    main()
