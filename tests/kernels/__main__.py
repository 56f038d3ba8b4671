"""What samepage does on other kernels: prints and writes a table of kernels and checks. `make test-kernels`.

python -m tests.kernels [--json FILE] [--checks NAME,...] [VERSION|PACKAGE|FILE.deb|here]...
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from samepage.commands.run import MEMORY
from tests.kernels.archive import Archive
from tests.kernels.boot import apparmor_parser, available, boot, emulator, unpack
from tests.kernels.table import Results, Row, is_well

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "kernels"

VERSIONS = ("5.10", "6.1", "6.12", "6.18", "", "here")
"""The oldest that is supported, those of Debian's releases, that of the machine this was made on, the newest, and
this machine's own, without a virtual machine."""

MINUTE = 60

HERE = ("emulator", "registered buffer", "main job", "of another user", "torture")
"""The checks that ask no more of a machine than any has, and change no setting of it."""


def check(
    archive: Archive, qemu: list[str], package: str, ways: tuple[str, ...], checks: list[str], patience: float
) -> dict[str, Row]:
    """What was said of each way to swap pages."""
    kernel = unpack(archive, package, FOLDER / Path(package).name.removesuffix(".deb"))
    asked = [f"{name}={os.environ[name]}" for name in ("KERNELS_UNMERGES", "KERNELS_RUN_2") if name in os.environ]
    command = ["env", f"KERNELS_PARSER={apparmor_parser(archive)}", *asked, *job(FOLDER)]
    results: dict[str, Row] = {}
    for way in ways:
        words = " ".join(f"'{word}'" for word in [*command, way, *checks])
        began = time.monotonic()
        status, said = boot(qemu, kernel, f"cd {ROOT} && {words}", FOLDER, timeout=patience)
        took = time.monotonic() - began
        if took >= patience:
            print(f"{kernel.release} {way}: time was up, the rest was not run", flush=True)
            status = 0
        results[f"{kernel.release} {way}"] = understood(status, said, took)
    return results


def check_here(ways: tuple[str, ...], checks: list[str], patience: float) -> dict[str, Row]:
    """The same of the kernel that runs here."""
    results: dict[str, Row] = {}
    for way in ways:
        began = time.monotonic()
        command = [*job(FOLDER), way, *([name for name in checks if name in HERE] or HERE)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=patience)
        (FOLDER / "here.log").write_text(done.stdout + done.stderr)
        took = time.monotonic() - began
        results[f"{os.uname().release} {way}"] = understood(done.returncode, done.stdout + done.stderr, took)
    return results


def understood(status: int, said: str, took: float) -> Row:
    """What job.py said."""
    checks: dict[str, str] = {}
    for line in re.findall(r"^SAID (.*)$", said, re.MULTILINE):
        checks |= json.loads(line)
    if status:
        checks["ended"] = f"{status}: {said[-1000:]}"
    slow = re.search(r"(\d+\.\d+) times as slow", said)
    return Row(
        checks=checks,
        trees=dict.fromkeys(checks, tree()),
        slow=float(slow[1]) if slow else 0.0,
        seconds=round(took),
        on=time.strftime("%Y-%m-%d"),
    )


def tree() -> str:
    """Which samepage this is: its commit, with a + if files differ from it; "" outside a repository."""
    command = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def job(folder: Path) -> list[str]:
    """The command that checks, after what it runs and is compiled was compiled."""
    programs = {
        "KERNELS_PROBE": "kernels/probe.c",
        "KERNELS_TORTURE": "agent/torture.c",
        "KERNELS_REGISTERED": "agent/registered.c",
    }
    for source in programs.values():
        target = folder / Path(source).stem
        command = ["gcc", "-std=gnu11", "-O2", "-pthread", str(ROOT / "tests" / source), "-o", str(target)]
        subprocess.run(command, check=True)
    named = [f"{name}={folder / Path(source).stem}" for name, source in programs.items()]
    named += [f"SAMEPAGE_MEMORY={MEMORY}", f"PYTHONPATH={ROOT}", "PYTHONDONTWRITEBYTECODE=1"]
    return ["env", *named, sys.executable, "tests/kernels/job.py"]


def remember(file: Path, results: dict[str, Row]) -> None:
    """Put it into a file. A check that was made before, and not now, stays."""
    known: Results = json.loads(file.read_text()) if file.exists() else {}
    for name, row in results.items():
        before = known.get(name)
        if before is not None:
            row |= {"checks": before["checks"] | row["checks"], "trees": before["trees"] | row["trees"]}
        known[name] = row
    file.write_text(json.dumps(known, indent=1) + "\n")


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
    ways, checks = tuple(args.ways.split(",")), [name for name in args.checks.split(",") if name]
    results: Results = {}
    for wanted in args.kernels or VERSIONS:
        if wanted == "here":
            found = check_here(ways, checks, args.minutes * MINUTE)
        else:
            package = wanted if wanted.startswith("linux-") or wanted.endswith(".deb") else archive.newest(wanted)
            if not package:
                print(f"skipped: Linux {wanted}: no package of it is to be had here", flush=True)
                continue
            found = check(archive, qemu, package, ways, checks, args.minutes * MINUTE)
        for name, row in found.items():
            print(f"{name}: {row['seconds']} s", flush=True)
        results |= found
        if args.json:
            remember(args.json, found)
    for name, row in results.items():
        for what, outcome in row["checks"].items():
            print(f"{name:32} {what:24} {outcome}")
    return int(not all(is_well(outcome) for row in results.values() for outcome in row["checks"].values()))


if __name__ == "__main__":
    sys.exit(main())
