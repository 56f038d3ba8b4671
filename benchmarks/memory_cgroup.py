"""Memory cgroups of either version, for benchmarks and tests that need a limit."""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 50


def version() -> int | None:
    """1 or 2: where this machine has the memory controller, and this user may make cgroups. None: nowhere."""
    if (V1 / "memory.limit_in_bytes").exists():
        return 1 if os.access(V1, os.W_OK) else None
    controllers = V2 / "cgroup.subtree_control"
    if controllers.exists() and os.access(controllers, os.W_OK) and "memory" in controllers.read_text():
        return 2
    return None


class MemoryCgroup:
    """A memory cgroup below the root, with a limit in bytes, that does not swap. Use with `with`: removed at the end,
    when all who were in it have ended."""

    def __init__(self, name: str, limit: int = UNLIMITED) -> None:
        self.v1 = version() == 1
        self.path = (V1 if self.v1 else V2) / f"samepage-{name}-{os.getpid()}"
        self.path.mkdir()
        try:
            if self.v1:
                self._write("memory.swappiness", 0)
            elif (self.path / "memory.swap.max").exists():
                self._write("memory.swap.max", 0)
            self.set_limit(limit)
        except BaseException:
            self.path.rmdir()
            raise

    def _write(self, name: str, value: int) -> None:
        (self.path / name).write_text(str(value))

    def set_limit(self, limit: int) -> None:
        """Bytes. On v1 OSError EBUSY when more is in use and cannot be reclaimed."""
        self._write("memory.limit_in_bytes" if self.v1 else "memory.max", limit)

    def usage(self) -> int:
        """Bytes."""
        return int((self.path / ("memory.usage_in_bytes" if self.v1 else "memory.current")).read_text())

    def killed(self) -> int:
        """Processes the OOM killer has killed in it so far."""
        events = (self.path / ("memory.oom_control" if self.v1 else "memory.events")).read_text()
        found = re.search(r"^oom_kill (\d+)", events, re.MULTILINE)
        return int(found[1]) if found else 0

    def refused(self) -> int:
        """How often memory was asked for that the limit did not allow (the kernel tries to reclaim then)."""
        if self.v1:
            return int((self.path / "memory.failcnt").read_text())
        found = re.search(r"^max (\d+)", (self.path / "memory.events").read_text(), re.MULTILINE)
        return int(found[1]) if found else 0

    def enter(self) -> list[str]:
        """A command that enters and becomes what follows it."""
        return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.path / "cgroup.procs")]

    def __enter__(self) -> MemoryCgroup:
        return self

    def __exit__(self, *_: object) -> None:
        # Who has ended may take a moment to be gone from it.
        deadline = time.monotonic() + 10
        while True:
            with contextlib.suppress(OSError):
                return self.path.rmdir()
            if time.monotonic() > deadline:
                return self.path.rmdir()
            time.sleep(0.05)
