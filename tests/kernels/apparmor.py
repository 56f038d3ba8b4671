"""What `samepage doctor` says under a profile of AppArmor's that forbids /dev/userfaultfd."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.kernels.network import mounted
from tests.kernels.patience import must

PROFILE = """
profile samepage-test flags=(attach_disconnected) {
  file,
  capability,
  network,
  unix,
  signal,
  ptrace,
  mount,
  deny /{,root/}dev/userfaultfd rw,
}
"""

SECURITY = "/sys/kernel/security"


def _confine() -> None:
    """What is executed next is under the profile."""
    own = Path("/proc/self/attr/apparmor/exec")  # 5.8
    (own if own.exists() else Path("/proc/self/attr/exec")).write_text("exec samepage-test")


def _doctor(before: Callable[[], None] | None = None) -> tuple[dict[str, Any], str]:
    """The facts, and the line on confinement."""
    command = [str(Path(sys.executable).parent / "samepage"), "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=before)
    must(done.stdout.startswith("{"), done.stderr)
    said = json.loads(done.stdout)
    (line,) = [found["value"] for found in said["findings"] if found["name"] == "confined"]
    return said["facts"], line


def apparmor(way: str) -> str:
    """It names the profile, and finds that the device is not to be had."""
    parser = os.environ.get("KERNELS_PARSER", "")
    if not parser:
        return "left alone: there is no apparmor_parser"
    with mounted("security", "securityfs", 0, "", SECURITY), tempfile.NamedTemporaryFile("w") as file:
        if not Path(SECURITY, "apparmor").exists():
            return "left alone: this kernel runs without AppArmor"
        file.write(PROFILE)
        file.flush()
        loaded = subprocess.run([parser, "--add", "--skip-cache", file.name], capture_output=True, text=True)
        must(loaded.returncode == 0, loaded.stderr)
        free, line = _doctor()
        must(not free["confined"] and line == "by nothing", f"{free['confined']} {line}")
        facts, line = _doctor(_confine)
        must(facts["confined"] == "samepage-test (enforce)" and line == f"by {facts['confined']}", f"{facts} {line}")
        must(facts["userfaultfd"] != "device", facts)
    return "ok"
