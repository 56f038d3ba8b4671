"""What is shown, as lines of text: no terminal and no service here."""

from __future__ import annotations

import locale
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MIB = 1 << 20

Row = dict[str, Any]

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII = "_.-=+*#@"
"""For terminals whose locale has no blocks."""

SAMPLES = 512
"""Samples that are kept for the sparklines."""


@dataclass(frozen=True, slots=True)
class Column:
    """`show` makes the text of a row; `width` is negative for what is set to the left. `rank`: of columns that do not
    all fit, those of the highest rank are left out."""

    title: str
    width: int
    show: Callable[[Row], str]
    key: Callable[[Row], Any]
    rank: int = 0


def mib(size: float) -> str:
    return f"{size / MIB:,.1f}"


def _pages(name: str) -> Callable[[Row], str]:
    return lambda row: mib(row.get(name, 0) * 4096)


def _number(name: str) -> Callable[[Row], Any]:
    return lambda row: row.get(name, 0)


def _state(row: Row) -> str:
    return str(row.get("state", "")) + (", unmerge waits" if row.get("unmerge_pending") else "")


PROCESSES = [
    Column("PID", 8, lambda row: str(row["pid"]), _number("pid")),
    Column("NAME", -14, lambda row: _printable(row.get("comm", "")), lambda row: str(row.get("comm", ""))),
    Column("DOMAIN", -15, lambda row: row["domain"], _number("domain"), 2),
    Column("MERGED", 10, _pages("merged"), _number("merged")),
    Column("KNOWN", 10, _pages("ksm_rmap_items"), _number("ksm_rmap_items")),
    Column("CPU%", 6, lambda row: f"{row.get('cpu', 0.0):.1f}", _number("cpu")),
    Column("STATE", -9, _state, _state, 1),
    Column("ZERO", 9, _pages("ksm_zero_pages"), _number("ksm_zero_pages"), 4),
    Column("FORKED", 9, _pages("pages_inherited"), _number("pages_inherited"), 5),
    Column("BROKEN", 9, _pages("pages_broken"), _number("pages_broken"), 6),
    Column("WAITING", 9, _pages("pages_deferred"), _number("pages_deferred"), 7),
    Column("NO MAPS", 9, _pages("pages_unmerged_vma"), _number("pages_unmerged_vma"), 8),
    Column("PROFIT", 10, lambda row: mib(row.get("ksm_process_profit", 0)), _number("ksm_process_profit"), 3),
    Column("SWAP", -9, lambda row: str(row.get("swap", "")), lambda row: str(row.get("swap", "")), 9),
    Column("ENGINE", -6, lambda row: str(row.get("engine", "user")), lambda row: str(row.get("engine", "")), 10),
]
"""Memory in MiB. CPU: of the agent, in the process."""

DOMAINS = [
    Column("DOMAIN", -24, lambda row: row["domain"], _number("domain")),
    Column("PROCESSES", 10, lambda row: str(row["processes"]), _number("processes")),
    Column("MERGED", 10, _pages("merged"), _number("merged")),
    Column("KNOWN", 10, _pages("ksm_rmap_items"), _number("ksm_rmap_items")),
    Column("CPU%", 6, lambda row: f"{row.get('cpu', 0.0):.1f}", _number("cpu")),
    Column("ZERO", 9, _pages("ksm_zero_pages"), _number("ksm_zero_pages"), 1),
    Column("FORKED", 9, _pages("pages_inherited"), _number("pages_inherited"), 2),
    Column("PROFIT", 10, lambda row: mib(row.get("ksm_process_profit", 0)), _number("ksm_process_profit"), 3),
]

SORTS = {"m": "MERGED", "k": "KNOWN", "c": "CPU%", "p": "PID", "n": "NAME"}
"""Columns by the key that sorts by them."""


def _printable(text: str) -> str:
    """A name may hold anything, and must not move the cursor."""
    return "".join(c if c.isprintable() else "?" for c in text)


def spark(values: list[float], width: int, steps: str = BLOCKS) -> str:
    """The last values as one line of blocks, the highest a full one."""
    values = values[-width:]
    top = max([*values, 0.0])
    cells = [steps[min(len(steps) - 1, int(max(v, 0.0) / top * len(steps)))] if top > 0 else steps[0] for v in values]
    return "".join(cells).rjust(width)


@dataclass(slots=True)
class View:
    """How things stand, and stood. `take` is given what `status` answers."""

    steps: str = BLOCKS
    counters: Row = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    sort: str = "MERGED"
    reverse: bool = True
    by_domain: bool = False
    selected: int | None = None
    saved: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    cpu: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    doing: str = ""
    _time: float = 0.0
    _top: int = 0

    def take(self, counters: Row, rows: list[Row], now: float) -> None:
        """What the service said at `now`, in seconds."""
        passed = now - self._time if self._time else 0.0
        before = {row["pid"]: row for row in self.rows}
        for row in rows:
            spent = row.get("cpu_seconds", 0.0) - before.get(row["pid"], row).get("cpu_seconds", 0.0)
            row["cpu"] = max(0.0, spent) / passed * 100 if passed else 0.0
        saved = counters.get("bytes_saved", sum(row.get("merged", 0) for row in rows) * 4096)
        self.saved.append(float(saved))
        if passed:
            if "cpu_seconds" in counters:
                spent = counters["cpu_seconds"] - self.counters.get("cpu_seconds", 0.0)
                self.cpu.append(max(0.0, spent) / passed * 100)
            else:
                self.cpu.append(sum(row["cpu"] for row in rows))
            self.doing = doing(self.counters, counters, passed)
        self.counters, self.rows, self._time = counters, rows, now

    def choose(self, column: str) -> None:
        """Sort by this; again: the other way round."""
        self.reverse = not self.reverse if self.sort == column else column != "NAME"
        self.sort = column

    def table(self) -> tuple[list[Column], list[Row]]:
        """Columns, and rows in the order chosen."""
        columns, rows = (DOMAINS, _summed(self.rows)) if self.by_domain else (PROCESSES, self.rows)
        by = next((column for column in columns if column.title == self.sort), columns[0])
        return columns, sorted(rows, key=by.key, reverse=self.reverse)

    def move(self, by: int) -> None:
        """Select the process so many lines further down."""
        pids = [row["pid"] for row in self.table()[1]] if not self.by_domain else []
        if pids:
            at = pids.index(self.selected) + by if self.selected in pids else 0
            self.selected = pids[min(max(at, 0), len(pids) - 1)]

    def chosen(self) -> Row | None:
        """The process that is selected, if it is there still."""
        return next((row for row in self.rows if row["pid"] == self.selected), None) if not self.by_domain else None

    def head(self, width: int) -> list[str]:
        """Three lines: sums, and two sparklines."""
        run = {0: "stopped", 1: self.doing or "merging", 2: "everything unmerged"}.get(self.counters.get("run", 1), "")
        owner = "bytes_saved" in self.counters
        what = "saved, net" if owner else "shared by your processes"
        now = self.saved[-1] if self.saved else 0.0
        sums = f"{mib(now)} MiB {what}   {len(self.rows)} processes   ksmd: "
        while len(sums + run) > width and ", " in run:  # rather say less than half of a number
            run = run.rpartition(", ")[0]
        first = sums + run
        cpu = list(self.cpu)
        label = f"{mib(now)} MiB"
        room = max(8, width - 8 - max(16, len(label)))
        lines = [
            first,
            f"{'saved':6}{label:>16}  " + spark(list(self.saved), room, self.steps),
            f"{'CPU':6}{f'{cpu[-1] if cpu else 0.0:.1f} %':>16}  " + spark(cpu, room, self.steps),
        ]
        return [line[:width] for line in lines]

    def lines(self, width: int, height: int) -> tuple[str, list[tuple[str, bool]]]:
        """The title line of the table, and `height` lines of it at most, each with whether it is selected."""
        columns, rows = self.table()
        columns = fitting(columns, width - 2)
        title = "  " + " ".join(_cell(c.title + ("*" if c.title == self.sort else ""), c.width) for c in columns)
        marked = self.selected if not self.by_domain else None
        at = next((n for n, row in enumerate(rows) if marked is not None and row["pid"] == marked), None)
        if at is not None:
            self._top = min(max(self._top, at - height + 1), at)
        self._top = max(0, min(self._top, len(rows) - height))
        lines = []
        for n, row in enumerate(rows[self._top : self._top + height], self._top):
            text = ("> " if n == at else "  ") + " ".join(_cell(c.show(row), c.width) for c in columns)
            lines.append((text[:width], n == at))
        return title[:width], lines or [("  no process has joined", False)]


def fitting(columns: list[Column], width: int) -> list[Column]:
    """Those for which there is room."""
    left = sorted(columns, key=lambda c: c.rank)
    while left and sum(abs(c.width) + 1 for c in left) - 1 > width:
        left.pop()
    return [c for c in columns if c in left]


def _cell(text: str, width: int) -> str:
    text = text if len(text) <= abs(width) else text[: abs(width) - 1] + "~"
    return text.ljust(-width) if width < 0 else text.rjust(width)


def _summed(rows: list[Row]) -> list[Row]:
    sums: dict[Any, Row] = {}
    names = ("merged", "ksm_rmap_items", "ksm_zero_pages", "pages_inherited", "ksm_process_profit", "cpu")
    for row in rows:
        total = sums.setdefault(row["domain"], {"domain": row["domain"], "processes": 0} | dict.fromkeys(names, 0))
        total["processes"] += 1
        for name in names:
            total[name] += row.get(name, 0)
    return list(sums.values())


def doing(before: Row, now: Row, passed: float) -> str:
    """What ksmd did meanwhile."""
    if "pages_scanned" not in now or "pages_scanned" not in before:
        return ""
    looked = (now["pages_scanned"] - before["pages_scanned"]) / passed
    merged = (
        now["pages_sharing"] + now["ksm_zero_pages"] - before["pages_sharing"] - before["ksm_zero_pages"]
    ) / passed
    said = []
    if merged > 0:
        said.append(f"merging {merged:,.0f} pages/s")
    if looked > 0:
        said.append(f"looking at {looked:,.0f} pages/s")
    return f"{', '.join(said) or 'nothing to do'}, pass {now.get('full_scans', 0):,}"


def question(row: Row, full: Row | None) -> str:
    """What is asked before a process is unmerged. `full`: its row with what is available to it; None if not known."""
    pages = row.get("merged", 0)
    lines = [f"Unmerge process {row['pid']} ({_printable(row.get('comm', ''))})?"]
    if not pages:
        lines.append("Nothing of it is merged now.")
    else:
        lines.append(f"It needs {mib(pages * 4096)} MiB for {pages:,} private pages.")
        if full is None or "bytes_available" not in full:
            lines.append("How much is available to it is not known: it does not answer, or is not yours.")
        elif (there := full["bytes_available"]) >= pages * 4096:
            lines.append(f"{mib(there)} MiB are available to it: enough.")
        else:
            lines.append(f"Only {mib(there)} MiB are available to it: it would stop with ENOMEM on the way,")
            lines.append("the rest stays merged, and nobody is killed.")
    if row.get("state", "running") != "running":
        lines.append(f"It is {row['state']}: it is unmerged when it answers again.")
    return "\n".join(lines)


def steps() -> str:
    """The blocks that this locale has."""
    try:
        BLOCKS.encode(locale.getpreferredencoding(False))
    except (UnicodeEncodeError, LookupError):
        return ASCII
    return BLOCKS
