"""What `samepage run` reports of its private service: the report file, and the summary at the end."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from samepage.memory import PAGE_SIZE
from samepage.memory.handshake import Terms
from samepage.memory.wire import Flags
from samepage.service.descriptors import raise_descriptor_limit
from samepage.service.engine import Engine, Engines
from samepage.service.log import log
from samepage.service.report_file import replace
from samepage.service.scanner import Scanner
from samepage.service.server import Server, keep_freed_memory

SAMPLE_EVERY = 0.1
"""Seconds between two looks at the counters: a peak shorter than that may be missed."""

WRITE_EVERY = 1.0
"""Seconds between two versions of the report file."""

LAST_SECONDS = 5.0
"""What was saved last, at the end, is the most in the last so many seconds with a process in them: the processes of a
command mostly end together, and the first of them to go takes the sharing with it."""

ENDED_MAX = 1000
"""Rows of ended processes that are kept; the oldest go first."""


class Report:
    """What was saved so far, at most and last, and the last row of every process.

    A process that ends takes its pages out of the counters, so only samples with a process in them count, and one is
    taken just before each process is dropped (`sample`). `started` is of `time.monotonic`.
    """

    def __init__(self, engines: Engines, path: Path | None, started: float) -> None:
        self._engines = engines
        self._path = path
        self._lock = threading.Lock()
        self._started = started
        self._counters = engines.counters()
        self._recent: deque[tuple[float, dict[str, Any]]] = deque()  # samples of the last LAST_SECONDS
        self._peak = 0
        self._over = False
        self._swaps: set[str] = set()
        self._rows: dict[int, dict[str, Any]] = {}  # by pid
        self._ended: deque[dict[str, Any]] = deque(maxlen=ENDED_MAX)

    def sample(self) -> None:
        """Look at the counters and rows as they are now."""
        with self._lock:
            rows = {row["pid"]: row for row in self._engines.rows()}
            self._ended.extend(row for pid, row in self._rows.items() if pid not in rows)
            self._rows = rows
            self._swaps.update(row["swap"] for row in rows.values() if "swap" in row)
            if rows and not self._over:
                self._counters = self._engines.counters()
                self._peak = max(self._peak, self._counters["bytes_saved"])
                now = time.monotonic()
                self._recent.append((now, self._counters))
                while self._recent[0][0] < now - LAST_SECONDS:
                    self._recent.popleft()

    def end(self) -> None:
        """Nothing more is coming: from now on the report shows what was saved last. Processes that are dropped only now
        are noted, but take nothing off it."""
        self.sample()
        with self._lock:
            self._over = True
            recent = [counters for _, counters in self._recent]
            self._counters = max(recent, key=lambda c: int(c["bytes_saved"]), default=self._counters)

    def summary(self) -> dict[str, Any]:
        """The report without the rows. Bytes, seconds. `swap`: the ways in which processes could swap pages.

        `cpu_seconds` is what this process took; `ksmd_cpu_seconds` is ksmd's part of it, and what the agents took
        in the other processes.
        """
        with self._lock:
            return {
                "bytes_saved": self._counters["bytes_saved"],
                "bytes_saved_peak": self._peak,
                **{name: value for name, value in self._counters.items() if name != "cpu_seconds"},
                "ksmd_cpu_seconds": round(self._counters["cpu_seconds"], 3),
                "swap": sorted(self._swaps),
                "wall_seconds": round(time.monotonic() - self._started, 3),
                "cpu_seconds": round(time.process_time(), 3),
                "service_rss_bytes": int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_SIZE,
            }

    def write(self) -> None:
        """Replace the report file, so that whoever reads it finds a whole one."""
        if self._path is None:
            return
        report = self.summary()
        with self._lock:
            report["processes"] = [row | {"ended": True} for row in self._ended]
            report["processes"] += [row | {"ended": False} for row in self._rows.values()]
        try:
            replace(self._path, json.dumps(report, indent=1) + "\n")
        except OSError as e:
            log(f"cannot write {self._path}: {e.strerror}")

    def keep_up(self, ended: threading.Event) -> None:
        """Sample, and write now and then, until `ended`."""
        written = 0.0
        while not ended.wait(SAMPLE_EVERY):
            self.sample()
            if time.monotonic() - written >= WRITE_EVERY:
                self.write()
                written = time.monotonic()


def serve(
    listener: socket.socket,
    line: socket.socket,
    knobs: list[tuple[str, str]],
    path: Path | None,
    started: float,
    reserve: int,
    write_protect: bool,
    others: Callable[[], Sequence[Engine]],
) -> None:
    """Serve `listener` until the parent asks over `line` for the summary, or is gone."""
    raise_descriptor_limit()
    keep_freed_memory()
    scanner = Scanner()
    try:
        for knob, value in knobs:
            scanner.set(knob, value)
    except OSError as e:
        line.send(json.dumps({"error": e.strerror}).encode())
        return
    if knobs:
        line.send(b"{}")
    engines = others()
    report = Report(Engines(scanner, engines), path, started)
    terms = Terms(reserve=reserve, flags=Flags.SWAP_WP if write_protect else 0)
    server = Server(listener, scanner, terms, report.sample, others=engines)
    ended = threading.Event()
    for run in (scanner.run, server.run):
        threading.Thread(target=run, daemon=True).start()
    sampler = threading.Thread(target=report.keep_up, args=(ended,), daemon=True)
    sampler.start()
    asked = line.recv(100)  # b"" when the parent was killed
    ended.set()
    sampler.join()
    report.end()
    report.write()
    summary = report.summary()
    server.stop()  # which takes samples as it drops the processes that are left
    if asked:
        line.send(json.dumps({"summary": summary | {"processes_joined": server.joined}}).encode())
