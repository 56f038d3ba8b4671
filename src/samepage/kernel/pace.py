"""When ksmd runs, and how fast: quickly while there is new memory, and otherwise as it was found, or more slowly.

By the kernel's defaults, ksmd looks at 100 pages and sleeps for 20 ms: 1 GiB takes it a minute, and a page is merged
when it was seen unchanged twice. That is a fair price for memory that was looked at already, but far too late for new
memory.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from samepage.kernel.settings import Settings, SettingsError
from samepage.service.log import log

QUICK = {"pages_to_scan": "20000", "sleep_millisecs": "1"}
"""Most of one CPU, at nice 5 as ksmd always is."""

PASSES = 3
"""Passes over new memory: one to see it, one to see that it stayed the same, and the one that was under way before."""

GREW = 4096
"""This many new pages, and at least a twentieth of what there was, are worth quick passes."""

MEASURE = 10.0
"""ksmd's CPU time is measured over so many seconds: the kernel reports it in hundredths of a second."""

SLEEP_MAX = 60_000

PRESSURE = 10.0
"""Memory is short if some process waited for it in more than this percentage of the last ten seconds (PSI)."""

ENOUGH_MORE = 5.0
"""There is enough memory again when this percentage more than the mark has been available for `ENOUGH_FOR` seconds."""
ENOUGH_FOR = 60.0


@dataclass(frozen=True, slots=True)
class Terms:
    """How to drive ksmd. `cpu`: the percentage of a CPU that it may take when there is nothing new. `when_short`: run
    it only while less than this percentage of memory is available, or while processes wait for memory; None: always.
    `stop_at_loss`: let it rest while merging costs more than it saves, until there is new memory; otherwise only say so
    in one line."""

    cpu: float = 5.0
    when_short: float | None = None
    stop_at_loss: bool = False

    @property
    def at_once(self) -> dict[str, str]:
        """The knobs to begin with."""
        return {"run": "1"} if self.when_short is None else {}


class Machine:
    """What the pace depends on."""

    def __init__(self) -> None:
        self._ksmd = _ksmd()

    def cpu_seconds(self) -> float | None:
        """ksmd's CPU time so far. None: it cannot be seen."""
        with contextlib.suppress(OSError):
            if self._ksmd is not None:
                stat = Path(f"/proc/{self._ksmd}/stat").read_text().rpartition(")")[2].split()
                return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
        return None

    def available(self) -> float:
        """The percentage of memory that is available."""
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        found = {fields[0]: int(fields[1]) for fields in lines}
        return 100 * found["MemAvailable:"] / found["MemTotal:"]

    def pressure(self) -> float:
        """In what percentage of the last ten seconds a process waited for memory. 0 if the kernel does not count it."""
        with contextlib.suppress(OSError):
            return float(Path("/proc/pressure/memory").read_text().split()[1].partition("=")[2])
        return 0.0

    def now(self) -> float:
        return time.monotonic()


def _ksmd() -> int | None:
    for comm in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            # A kernel thread: a program may have any name.
            if comm.read_text() == "ksmd\n" and not os.path.lexists(comm.with_name("exe")):
                return int(comm.parent.name)
    return None


class Pace:
    """Sets the pace while knobs are held. Does nothing where the kernel's own advisor does (6.8, `advisor_mode`)."""

    def __init__(
        self,
        settings: Settings,
        terms: Terms | None = None,
        machine: Machine | None = None,
        tell: Callable[[str], None] = log,
    ) -> None:
        self._settings, self._terms, self._machine, self._tell = settings, terms or Terms(), machine or Machine(), tell
        self._leave = settings.read("advisor_mode", "none") != "none"
        self._idle = {name: settings.found(name, "") for name in QUICK}
        self._found_sleep = int(self._idle["sleep_millisecs"] or 0)
        self._seen = self._until = 0
        self._judge = int(settings.read("full_scans", "0")) + PASSES  # before, everything costs and nothing is saved
        self._quick = False
        self._measured: tuple[float, float] | None = None  # when, and ksmd's CPU time then
        self._short = self._terms.when_short is None
        self._enough_since: float | None = None
        self._loses = False

    def look(self, pages: int) -> None:
        """Call this now and then, with the number of anonymous pages."""
        try:
            if not self._settings.lead():
                return
            scans = int(self._settings.read("full_scans", "0"))
            if pages >= self._seen + max(GREW, self._seen // 20):
                self._seen, self._until = pages, scans + PASSES
                self._judge, self._loses = scans + 2 * PASSES, False
            self._seen = min(self._seen, max(pages, 0) + GREW)
            self._whether(scans)
            if not self._leave:
                self._how_fast(scans < self._until)
        except SettingsError:
            self._leave = self._short = True  # somebody else has changed the settings
            self._terms = Terms()

    def _how_fast(self, quick: bool) -> None:
        if quick != self._quick:
            self._quick, self._measured = quick, None
            self._settings.change(QUICK if quick else self._idle)
        if not quick:
            self._stay_within_budget()

    def _stay_within_budget(self) -> None:
        """Stay within the budget by a longer sleep, or a somewhat shorter one, but never shorter than it was found."""
        now, cpu = self._machine.now(), self._machine.cpu_seconds()
        if cpu is None:
            return
        if self._measured is None:
            self._measured = now, cpu
        since, before = self._measured
        if now - since < MEASURE:
            return
        self._measured = now, cpu
        share, sleep = 100 * (cpu - before) / (now - since), int(self._idle["sleep_millisecs"])
        if share > self._terms.cpu:
            sleep = min(SLEEP_MAX, 1 + int(max(sleep, 1) * min(10.0, share / self._terms.cpu)))
        elif share < self._terms.cpu / 2:
            sleep = max(self._found_sleep, sleep // 2)
        if str(sleep) != self._idle["sleep_millisecs"]:
            self._idle["sleep_millisecs"] = str(sleep)
            self._settings.change(self._idle)

    def _whether(self, scans: int) -> None:
        """Decide whether ksmd runs at all."""
        self._look_at_memory()
        self._look_at_profit(scans)
        wanted = self._short and not (self._loses and self._terms.stop_at_loss)
        asked = self._terms.when_short is not None or self._terms.stop_at_loss
        if asked and self._settings.read("run", "0") != str(int(wanted)):
            self._settings.change({"run": str(int(wanted))})

    def _look_at_memory(self) -> None:
        mark = self._terms.when_short
        if mark is None:
            return
        now, available, pressure = self._machine.now(), self._machine.available(), self._machine.pressure()
        if available < mark or pressure > PRESSURE:
            self._short, self._enough_since = True, None
        elif available < mark + ENOUGH_MORE:
            self._enough_since = None
        elif self._enough_since is None:
            self._enough_since = now
        elif now - self._enough_since >= ENOUGH_FOR:
            self._short = False

    def _look_at_profit(self, scans: int) -> None:
        profit = int(self._settings.read("general_profit", "0"))  # since 6.4
        loses = profit < 0 and scans >= self._judge
        if loses and not self._loses:
            done = "ksmd rests until there is new memory" if self._terms.stop_at_loss else "ksmd goes on"
            self._tell(f"merging does not pay: it costs {-profit} bytes more than it saves; {done}")
        self._loses = loses or (self._loses and self._terms.stop_at_loss)
