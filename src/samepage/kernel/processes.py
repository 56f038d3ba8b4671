"""The processes of one command, as the kernel merges them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from samepage.kernel.pace import Pace
from samepage.kernel.rows import anonymous_pages, row_of
from samepage.kernel.settings import start_time
from samepage.service.machine import SharedByCommand, is_near


class KernelProcesses(SharedByCommand):
    """What the command's processes share, by /proc/PID/ksm_stat."""

    SUMMED = ("merged", "ksm_merging_pages", "ksm_zero_pages", "ksm_process_profit")

    def __init__(self, report: Path | None, pace: Pace | None = None) -> None:
        super().__init__(report)
        self._pace = pace
        self._since = start_time(os.getpid()) or 0

    def _ask(self) -> list[dict[str, Any]]:
        pids = (int(entry) for entry in os.listdir("/proc") if entry.isdecimal())
        rows = (row_of(pid, near=True) for pid in pids if self._is_new(pid))
        return [row for row in rows if row is not None and row["ksm_merge_any"]]

    def look(self) -> None:
        super().look()
        if self._pace is not None:
            self._pace.look(sum(anonymous_pages(pid) for pid in self._rows))

    def _is_new(self, pid: int) -> bool:
        """Whether a process started after this one, and so could be the command's. Others are not asked: to answer, the
        kernel may have to wait as long as they change their memory."""
        started = start_time(pid)
        with contextlib.suppress(OSError):
            return started is not None and started >= self._since and pid != os.getpid() and is_near(pid)
        return False

    def _about(self) -> dict[str, Any]:
        return {"engine": "kernel"}
