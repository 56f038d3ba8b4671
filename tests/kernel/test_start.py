"""What the kernel's engine costs before it does anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks import kernel_ksm
from tests.kernel.conftest import StartHolder, mergeable, needs_ksm

pytestmark = needs_ksm


def imported(folder: Path, *arguments: str) -> set[str]:
    """The modules that a `samepage` command imports, which must succeed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SAMEPAGE_")}
    command = [sys.executable, "-X", "importtime", "-m", "samepage", *arguments]
    with open(folder / "errors", "w") as errors:
        subprocess.run(command, env=environment, stderr=errors, check=True, timeout=100)
    lines = (folder / "errors").read_text().splitlines()
    return {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}


def test_attaching_does_without_numpy_which_takes_longer_to_load_than_the_rest(
    start: StartHolder, tmp_path: Path
) -> None:
    process = start()
    with kernel_ksm.borrowed(run=0):
        assert "numpy" not in imported(tmp_path, "attach", str(process.pid))
        assert mergeable(process.pid)
        assert "samepage.kernel.attach" in imported(tmp_path, "attach", str(process.pid))


def test_so_does_a_command_that_the_kernel_merges(tmp_path: Path) -> None:
    with kernel_ksm.borrowed(run=0):
        modules = imported(tmp_path, "run", "--engine", "kernel", "--", "sleep", "1")
        assert "samepage.kernel.pace" in modules
        assert "numpy" not in modules
