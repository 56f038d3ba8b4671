"""Every fuzzer in its turn: `python -m tests.fuzz --seconds N`, which is `make fuzz SECONDS=N`. Ends with 1 if one
found something; each says how to see it again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

FUZZERS = {"tests.fuzz.model": 0.6, "tests.fuzz.agent": 0.2, "tests.fuzz.service": 0.2}
"""What each is of the time."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    seconds = parser.parse_args().seconds
    status = 0
    for module, part in FUZZERS.items():
        status |= subprocess.run([sys.executable, "-m", module, "--seconds", str(seconds * part)]).returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
