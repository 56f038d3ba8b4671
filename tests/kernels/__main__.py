"""Run the main job on other kernels, and print and write what became of it: `make test-kernels`.

python -m tests.kernels [--json FILE] [PACKAGE|FILE.deb]...
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from tests.kernels.boot import available, boot, unpack

ROOT = Path(__file__).parents[2]
META = ("linux-image-amd64",)
"""What each of these depends on is the newest of its release."""

PATIENCE = 300
"""Seconds that a check may take in an emulated machine, which is some twenty times as slow."""


def newest() -> list[str]:
    """Names of Debian's newest kernel packages."""
    found = []
    for meta in META:
        said = subprocess.run(["apt-cache", "depends", meta], capture_output=True, text=True).stdout
        found += re.findall(r"Depends: (linux-image-\S+)", said)[:1]
    return found


def check(package: str, folder: Path) -> dict[str, dict[str, str]]:
    """What was said of each way to swap pages."""
    kernel = unpack(package, folder / Path(package).name.removesuffix(".deb"))
    results = {}
    for way in ("move", "wp"):
        command = f"cd {ROOT} && PYTHONDONTWRITEBYTECODE=1 {sys.executable} tests/kernels/job.py {way} {PATIENCE}"
        status, said = boot(kernel, command, folder, timeout=4 * PATIENCE)
        found = re.search(r"^SAID (.*)$", said, re.MULTILINE)
        results[f"{kernel.release} {way}"] = json.loads(found[1]) if found else {"ended": f"{status}: {said[-2000:]}"}
    return results


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels", description=__doc__)
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("packages", metavar="PACKAGE", nargs="*")
    args = parser.parse_args()
    if missing := available():
        print(f"skipped: {missing} is missing")
        return 0
    results: dict[str, dict[str, str]] = {}
    for package in args.packages or newest():
        results |= check(package, ROOT / "build" / "kernels")
    for name, said in results.items():
        for what, outcome in said.items():
            print(f"{name:32} {what:24} {outcome}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return int(any(not o.startswith(("ok", "left alone")) for said in results.values() for o in said.values()))


if __name__ == "__main__":
    sys.exit(main())
