"""`samepage run --progress`: lines on a terminal, and only there."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
import time

import pytest

from samepage.commands import progress
from samepage.commands.progress import Progress
from tests.commands.test_service_commands import environment

SHORT = "from samepage.commands import main, progress; progress.FIRST = 0.5; import sys; sys.exit(main(sys.argv[1:]))"
COMMAND = [sys.executable, "-c", SHORT, "run", "--progress", "--set", "run=0", "--", "sh", "-c", "sleep 4; exit 3"]


def test_on_a_terminal_there_are_whole_lines() -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(COMMAND, env=environment(), stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):
            while part := os.read(ours, 4096):
                shown += part
    assert process.returncode == 3
    assert b"MiB saved, 0 processes\r\n" in shown


def test_elsewhere_there_are_none() -> None:
    done = subprocess.run(COMMAND, env=environment(), capture_output=True, text=True)
    assert (done.returncode, "MiB saved, 0" in done.stderr) == (3, False)


def test_lines_come_ever_more_rarely(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "isatty", lambda fd: True)
    told = Progress(lambda: "x")
    for now[0] in range(300):
        told.look()
    seconds = [line.split()[1] for line in capfd.readouterr().err.splitlines()]
    assert seconds == ["0:05:", "0:15:", "0:35:", "1:15:", "2:15:", "3:15:", "4:15:"]


def test_a_service_that_is_gone_is_no_mistake(tmp_path: object) -> None:
    assert "not known" in progress.saved(f"{tmp_path}/nothing")
