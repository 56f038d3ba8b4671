"""The agent's thread gets its lock, though application threads want it all the time."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

from tests.agent.preload import SOURCES, compile_c

HERE = Path(__file__).parent


def test_the_agent_has_its_lock_soon_where_more_threads_run_than_there_are_cpus(tmp_path: Path) -> None:
    """It stands back while somebody waits, but not for as long as all the others may run."""
    base = [str(SOURCES / "base" / name) for name in ("lock.c", "stalls.c", "system.c")]
    arch = [str(path) for path in sorted((SOURCES / "arch" / platform.machine()).glob("*.c"))]
    model = compile_c(HERE / "lock_model.c", tmp_path / "lock_model", f"-I{SOURCES}", *base, *arch, "-pthread")
    done = subprocess.run([str(model), "4"], capture_output=True, text=True, timeout=100, check=True)
    assert int(done.stdout) < 5000
