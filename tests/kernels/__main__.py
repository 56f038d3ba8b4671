"""What samepage does on other kernels: prints and writes a table of kernels and checks. `make test-kernels`.

python -m tests.kernels [--json FILE] [--checks NAME,...] [VERSION|PACKAGE|FILE.deb]...
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

from tests.kernels.archive import Archive
from tests.kernels.boot import available, boot, emulator, unpack

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "kernels"

VERSIONS = ("5.10", "6.1", "6.12", "6.18", "")
"""The oldest that is supported, those of Debian's releases, that of the machine this was made on, and the newest."""

MINUTE = 60

FEW = ("-DTHREADS=2", "-DREGIONS=4")
"""So little is tortured, for an agent whose lock eight emulated threads want comes to nothing."""

Results = dict[str, dict[str, str]]


def check(
    archive: Archive, qemu: list[str], package: str, ways: tuple[str, ...], checks: list[str], patience: float
) -> Results:
    """What was said of each way to swap pages."""
    kernel = unpack(archive, package, FOLDER / Path(package).name.removesuffix(".deb"))
    tools = build(FOLDER)
    results: Results = {}
    for way in ways:
        words = " ".join(f"'{name}'" for name in checks)
        env = f"PYTHONDONTWRITEBYTECODE=1 PYTHONPATH={ROOT} {tools}"
        command = f"cd {ROOT} && {env} {sys.executable} tests/kernels/job.py {way} {words}"
        began = time.monotonic()
        status, said = boot(qemu, kernel, command, FOLDER, timeout=patience)
        row: dict[str, str] = {}
        for line in re.findall(r"^SAID (.*)$", said, re.MULTILINE):
            row |= json.loads(line)
        if status:
            row["ended"] = f"{status}: {said[-1000:]}"
        results[f"{kernel.release} {way}"] = row
        print(f"{kernel.release} {way}: {time.monotonic() - began:.0f} s", flush=True)
    return results


def build(folder: Path) -> str:
    """What runs in there and is compiled out here; the environment that names it."""
    programs = {
        "KERNELS_PROBE": "kernels/probe.c",
        "KERNELS_TORTURE": "agent/torture.c",
        "KERNELS_REGISTERED": "agent/registered.c",
    }
    for source in programs.values():
        target = folder / Path(source).stem
        command = ["gcc", "-std=gnu11", "-O2", "-pthread", *FEW, str(ROOT / "tests" / source), "-o", str(target)]
        subprocess.run(command, check=True)
    return " ".join(f"{name}={folder / Path(source).stem}" for name, source in programs.items())


def is_well(outcome: str) -> bool:
    """Whether a check went as it should, or nothing was to be checked."""
    return outcome.startswith(("ok", "left alone"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels", description=__doc__)
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--ways", metavar="WAY,...", default="move,wp")
    parser.add_argument("--checks", metavar="NAME,...", default="")
    parser.add_argument("--minutes", type=float, default=30.0, help="for one boot")
    parser.add_argument("kernels", metavar="VERSION|PACKAGE|FILE", nargs="*")
    args = parser.parse_args()
    if missing := available():
        print(f"skipped: {missing} is missing")
        return 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    archive = Archive(FOLDER)
    qemu = emulator(archive)
    print(subprocess.run([*qemu, "--version"], capture_output=True, text=True).stdout.splitlines()[0], flush=True)
    results: Results = {}
    for wanted in args.kernels or VERSIONS:
        package = wanted if wanted.startswith("linux-") or wanted.endswith(".deb") else archive.newest(wanted)
        if not package:
            print(f"skipped: Linux {wanted}: no package of it is to be had here", flush=True)
            continue
        checks = [name for name in args.checks.split(",") if name]
        results |= check(archive, qemu, package, tuple(args.ways.split(",")), checks, args.minutes * MINUTE)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")
    for name, row in results.items():
        for what, outcome in row.items():
            print(f"{name:32} {what:24} {outcome}")
    return int(not all(is_well(outcome) for row in results.values() for outcome in row.values()))


if __name__ == "__main__":
    sys.exit(main())
