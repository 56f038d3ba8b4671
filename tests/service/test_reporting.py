"""What `samepage run` reports at the end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from samepage.service import report_file
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


@pytest.mark.parametrize("name", [f".report.{os.getpid()}", ".report.0"])
def test_a_report_is_written_through_nothing_that_lies_in_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(os, "urandom", bytes)  # as if somebody had guessed the name
    victim, report = tmp_path / "victim", tmp_path / "report"
    victim.write_text("precious")
    for link in (tmp_path / name, tmp_path / f".report.{bytes(8).hex()}"):
        link.symlink_to(victim)
    Report(Scanner(), report, 0.0).write()  # type: ignore[arg-type]
    assert victim.read_text() == "precious"
    with pytest.raises(FileExistsError):
        report_file.replace(report, "more")
    assert victim.read_text() == "precious"


def test_a_report_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    report = tmp_path / "report"
    for n in range(2):
        report_file.replace(report, json.dumps(n))
    assert report.read_text() == "1"
    assert os.listdir(tmp_path) == ["report"]
    assert report.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
