"""What `samepage scan` predicts for statically linked programs, and what the kernel then saves of them.

    python -m benchmarks.static_programs [--programs 3] [--memory 128] [--json FILE]

They are programs in Go with the same memory, started plainly, and attached to while they run. As root; the kernel's KSM
is put back as it was. Needs Go.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from pathlib import Path

from benchmarks.virtual_machines import Spoken, borrowed, measure, report


def build(folder: Path) -> Path:
    """Without cgo, so it is linked statically."""
    environment = os.environ | {"CGO_ENABLED": "0", "GOCACHE": str(folder / "cache"), "GOFLAGS": "-mod=mod"}
    source = Path(__file__).with_suffix(".go")
    subprocess.run(["go", "build", "-o", str(folder / "program"), str(source)], env=environment, check=True)
    return folder / "program"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=3)
    parser.add_argument("--memory", type=int, default=128, help="MiB of each")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds that merging may take")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, borrowed():
        program = build(Path(folder))
        programs = [Spoken([str(program), str(args.memory)]) for _ in range(args.programs)]
        record = measure(programs, args.limit)
    report(record, args.json)


if __name__ == "__main__":
    main()
