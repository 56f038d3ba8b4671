"""The processes of one command, as the kernel merges them."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any

from samepage.kernel.pace import Pace
from samepage.kernel.settings import start_time
from samepage.kernel.target import name
from samepage.service.machine import SharedByCommand, is_near

FIELDS = ("ksm_merging_pages", "ksm_zero_pages", "ksm_process_profit")


class KernelProcesses(SharedByCommand):
    """What the command's processes share, by /proc/PID/ksm_stat."""

    SUMMED = ("merged", *FIELDS)

    def __init__(self, report: Path | None, pace: Pace | None = None) -> None:
        super().__init__(report)
        self._pace = pace
        self._since = start_time(os.getpid()) or 0

    def _ask(self) -> list[dict[str, Any]]:
        pids = (int(entry) for entry in os.listdir("/proc") if entry.isdecimal())
        return [row for pid in pids if self._is_new(pid) and (row := _row(pid)) is not None]

    def look(self) -> None:
        super().look()
        if self._pace is not None:
            self._pace.look(sum(_anonymous(pid) for pid in self._rows))

    def _is_new(self, pid: int) -> bool:
        """Whether it started after this one, and could be the command's. Others are not asked: to answer, the kernel
        may have to wait for whatever they do with their memory."""
        started = start_time(pid)
        with contextlib.suppress(OSError):
            return started is not None and started >= self._since and pid != os.getpid() and is_near(pid)
        return False

    def _about(self) -> dict[str, Any]:
        return {"engine": "kernel"}


def _anonymous(pid: int) -> int:
    """Its pages of anonymous memory, merged or not."""
    with contextlib.suppress(OSError):
        resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[1:3]
        return int(resident) - int(shared)
    return 0


def _row(pid: int) -> dict[str, Any] | None:
    """None: its memory is not mergeable by itself, or it is another user's, or it has ended."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/ksm_stat").read_text()
        if "ksm_merge_any: yes" in text:
            found = {key: int(value) for key, value in re.findall(r"^(\w+):? (-?\d+)$", text, re.MULTILINE)}
            counts = {field: found.get(field, 0) for field in FIELDS}
            merged = counts["ksm_merging_pages"] + counts["ksm_zero_pages"]
            return {"pid": pid, "name": name(pid), "merged": merged, **counts}
    return None
