"""What `samepage run` reports at the end."""

from __future__ import annotations

from typing import Any

from samepage.service.reporting import Report


class Scanner:
    """Counters and rows as a test has them."""

    def __init__(self) -> None:
        self.saved = 0
        self.pids: list[int] = []

    def counters(self) -> dict[str, Any]:
        return {"bytes_saved": self.saved, "cpu_seconds": 0.0}

    def rows(self) -> list[dict[str, Any]]:
        return [{"pid": pid, "swap": "move"} for pid in self.pids]


def test_who_is_dropped_after_the_end_takes_nothing_off_what_was_saved_last() -> None:
    """Both processes end with the command; the service notices the second only when the report is asked for."""
    scanner = Scanner()
    report = Report(scanner, None, 0.0)  # type: ignore[arg-type]
    scanner.saved, scanner.pids = 2 << 20, [1, 2]
    report.sample()
    scanner.saved, scanner.pids = 0, [2]
    report.sample()
    report.end()
    report.sample()  # just before the second is dropped
    summary = report.summary()
    assert (summary["bytes_saved"], summary["bytes_saved_peak"]) == (2 << 20, 2 << 20)
