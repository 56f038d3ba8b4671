"""What the processes of one command share with others, according to the daemon that `samepage run` joins, or to the
kernel.

A daemon, or ksmd, serves other commands, too. An environment variable, which processes inherit from the command, marks
this command's processes. What they save cannot be told apart from what others save with the same pages; so this counts
what they share.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samepage.service.report_file import replace
from samepage.service.sockets import ControlError

if TYPE_CHECKING:
    from samepage.service.control import Client

PAGE_SIZE = os.sysconf("SC_PAGESIZE")

LOOK_EVERY = 0.25
"""Seconds between two looks."""

WRITE_EVERY = 1.0
"""Seconds between two versions of the report file."""

PATIENCE = 1.0
"""How many seconds a daemon has to answer: only the report needs it."""

LAST_SECONDS = 5.0
"""The last amount shared is the most within so many seconds, since the processes of a command usually end together."""

SUMMED = ("merged", "ksm_merging_pages", "ksm_zero_pages", "pages_inherited", "pages_broken", "ksm_process_profit")


def is_near(pid: int, of: int | None = None) -> bool:
    """Whether a process is this user's, or descends from this one, or from `of`. For other processes, never read a file
    for which the kernel reads in the process's memory: a process that keeps that locked makes the reader wait as long
    as it likes. Raises OSError."""
    uids, parent = _status(pid)
    if uids == {os.getuid()}:
        return True
    of = os.getpid() if of is None else of
    while parent > 1 and parent != of:
        parent = _status(parent)[1]
    return parent == of


def is_marked(pid: int, variable: tuple[str, str], of: int | None = None) -> bool:
    """Whether a process that is near has this variable in its environment."""
    mark = f"{variable[0]}={variable[1]}\0".encode()
    with contextlib.suppress(OSError):
        return is_near(pid, of) and mark in Path(f"/proc/{pid}/environ").read_bytes() + b"\0"
    return False


def _status(pid: int) -> tuple[set[int], int]:
    """User ids, and the parent."""
    lines = Path(f"/proc/{pid}/status").read_bytes().split(b"\n")
    found = {name: value.split() for name, _, value in (line.partition(b":") for line in lines)}
    return set(map(int, found[b"Uid"])), int(found[b"PPid"][0])


class SharedByCommand:
    """What the processes share that have `variable` in their environment. `report` is a file that is kept up to
    date."""

    SUMMED: tuple[str, ...]
    """The fields that are summed over all rows."""

    def __init__(self, report: Path | None) -> None:
        self.variable = ("SAMEPAGE_RUN", os.urandom(8).hex())
        self._report = report
        self._started = self._written = time.monotonic()
        self._ours: dict[int, bool] = {}
        self._rows: dict[int, dict[str, Any]] = {}
        self._ended: deque[dict[str, Any]] = deque(maxlen=1000)
        self._joined = 0
        self._peak = 0
        self._recent: deque[tuple[float, int]] = deque()

    def look(self) -> None:
        """Look at the processes. Call this every `LOOK_EVERY` seconds."""
        with contextlib.suppress(ControlError):
            self._take_in(self._ask())
            if time.monotonic() - self._written >= WRITE_EVERY:
                self._write()

    def now(self) -> tuple[int, int]:
        """How many bytes the command's processes shared at the last look, and how many processes there were."""
        return self._recent[-1][1] if self._rows else 0, len(self._rows)

    def finish(self) -> dict[str, Any]:
        """Call this when the command has ended. Writes the last report and returns it without the rows."""
        self._write()
        return self._summary()

    def _ask(self) -> list[dict[str, Any]]:
        """A row for every merged process, this command's or not. Raises `ControlError` if that is unknown now."""
        raise NotImplementedError

    def _about(self) -> dict[str, Any]:
        """Further fields of the report."""
        raise NotImplementedError

    def _take_in(self, rows: list[dict[str, Any]]) -> None:
        self._ours = {row["pid"]: self._ours.get(row["pid"]) or self._is_ours(row["pid"]) for row in rows}
        now = {row["pid"]: row for row in rows if self._ours[row["pid"]]}
        self._joined += sum(pid not in self._rows for pid in now)
        self._ended.extend(row for pid, row in self._rows.items() if pid not in now)
        self._rows = now
        if now:
            shared = PAGE_SIZE * sum(row["merged"] for row in now.values())
            self._peak = max(self._peak, shared)
            self._recent.append((time.monotonic(), shared))
            while self._recent[0][0] < time.monotonic() - LAST_SECONDS:
                self._recent.popleft()

    def _is_ours(self, pid: int) -> bool:
        return is_marked(pid, self.variable)

    def _summary(self) -> dict[str, Any]:
        rows = self._rows.values()
        return {
            "bytes_shared": max((shared for _, shared in self._recent), default=0),
            "bytes_shared_peak": self._peak,
            "processes_joined": self._joined,
            "wall_seconds": round(time.monotonic() - self._started, 3),
            **self._about(),
            **{name: sum(row[name] for row in rows) for name in self.SUMMED},
        }

    def _write(self) -> None:
        self._written = time.monotonic()
        if self._report is None:
            return
        rows = [row | {"ended": True} for row in self._ended] + [row | {"ended": False} for row in self._rows.values()]
        with contextlib.suppress(OSError):
            replace(self._report, json.dumps(self._summary() | {"processes": rows}, indent=1) + "\n")


class MachineDaemon(SharedByCommand):
    """The daemon at `path`."""

    SUMMED = SUMMED

    def __init__(self, path: str, report: Path | None) -> None:
        super().__init__(report)
        self.path = path
        self._client: Client | None = None

    def _ask(self) -> list[dict[str, Any]]:
        from samepage.service.control import Client

        try:
            if self._client is None:
                self._client = Client(self.path, PATIENCE)
            rows: list[dict[str, Any]] = self._client.ask("status", brief=True).get("processes", [])
            return [row for row in rows if "swap" in row]  # the agents' only: the kernel's is counted separately
        except ControlError:
            if self._client is not None:
                self._client.close()
            self._client = None
            raise

    def _about(self) -> dict[str, Any]:
        rows = [*self._ended, *self._rows.values()]
        return {"daemon": self.path, "swap": sorted({row["swap"] for row in rows})}
