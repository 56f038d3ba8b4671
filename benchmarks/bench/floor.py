"""How long the work alone takes that merging as samepage does it cannot do without (floor.c)."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def floor(mib: int, skip: Callable[[str, str], None]) -> Iterator[Callable[[], dict[str, float]] | None]:
    """What measures it, in seconds, for two processes of that size. None where it cannot be had."""
    with tempfile.TemporaryDirectory(prefix="samepage-bench-") as folder:
        program = f"{folder}/floor"
        source = str(Path(__file__).with_name("floor.c"))
        try:
            subprocess.run(["cc", "-O2", "-march=native", "-Wall", "-Wextra", source, "-o", program], check=True)
            subprocess.run([program, "16"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as why:
            skip("the floor", f"needs cc, libxxhash-dev, root, and UFFDIO_MOVE (Linux 6.8): {why}")
            yield None
            return
        yield lambda: json.loads(subprocess.run([program, str(mib)], check=True, capture_output=True).stdout)
