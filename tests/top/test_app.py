"""`samepage top` at its keys, by textual's pilot, and in a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Static

from samepage.top.app import Ask, Top
from tests.top.test_view import COUNTERS, row

Steps = Callable[[Pilot[None], Top], Awaitable[None]]


class Fake:
    path = "/run/x.sock"

    def __init__(self) -> None:
        self.rows = [row(n, 100 - n) for n in range(1, 31)]
        self.counters = dict(COUNTERS)
        self.asked: list[Any] = []
        self.wrong = ""

    def look(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        if self.wrong:
            raise OSError(errno.EPIPE, self.wrong)
        return dict(self.counters), [dict(row) for row in self.rows]

    def available(self, pid: int) -> dict[str, Any] | None:
        return row(pid, 100) | {"bytes_available": 1 << 10}

    def set_run(self, run: int) -> None:
        self.asked.append(("run", run))
        self.counters["run"] = run

    def unmerge(self, pid: int) -> dict[str, Any]:
        self.asked.append(("unmerge", pid))
        return {"errno": None, "pages_unmerged": 99}


def drive(source: Fake, steps: Steps, size: tuple[int, int] = (80, 24)) -> None:
    async def run() -> None:
        app = Top(source, lambda outcome: f"{outcome['pages_unmerged']} pages unmerged", every=0.05)
        async with app.run_test(size=size) as pilot:
            await until(pilot, lambda: bool(app.view.rows))
            await steps(pilot, app)

    asyncio.run(run())


async def until(pilot: Pilot[None], condition: Callable[[], bool]) -> None:
    for _ in range(200):
        if condition():
            return
        await pilot.pause(0.05)
    raise AssertionError("not in time")


def text(app: Top) -> str:
    return "\n".join(str(widget.render()) for widget in app.screen_stack[0].query(Static))


@pytest.mark.parametrize("size", [(80, 24), (200, 50), (40, 10), (20, 5)])
def test_it_shows_processes_at_any_size(size: tuple[int, int]) -> None:
    async def steps(pilot: Pilot[None], app: Top) -> None:
        lines = text(app).splitlines()
        assert len(lines) <= max(size[1], 8) + 2
        assert max(map(len, lines)) <= max(size[0], 80)
        assert "> " in text(app)

    drive(Fake(), steps, size)


def test_keys_select_and_sort() -> None:
    async def steps(pilot: Pilot[None], app: Top) -> None:
        assert app.view.selected == 1
        await pilot.press("down", "down", "up")
        assert app.view.selected == 2
        await pilot.press("end")
        assert app.view.selected == 30
        assert "> " in text(app)
        await pilot.press("n")
        assert app.view.sort == "NAME"
        await pilot.press("d")
        assert "PROCESSES" in text(app)

    drive(Fake(), steps)


def test_an_unmerge_is_done_only_after_its_price_was_told_and_y_was_pressed() -> None:
    source = Fake()

    async def steps(pilot: Pilot[None], app: Top) -> None:
        for key, asked in (("n", []), ("escape", []), ("y", [("unmerge", 1)])):
            await pilot.press("u")
            await until(pilot, lambda: isinstance(app.screen, Ask))
            assert isinstance(app.screen, Ask)
            assert "ENOMEM" in app.screen.text
            await pilot.press(key)
            await until(pilot, lambda asked=asked: source.asked == asked)  # type: ignore[misc]
        await until(pilot, lambda: "99 pages unmerged" in text(app))

    drive(source, steps)


def test_merging_is_stopped_and_goes_on() -> None:
    source = Fake()

    async def steps(pilot: Pilot[None], app: Top) -> None:
        await pilot.press("s")
        await until(pilot, lambda: "ksmd: stopped" in text(app))
        await pilot.press("s")
        await until(pilot, lambda: source.asked == [("run", 0), ("run", 1)])

    drive(source, steps)


def test_a_service_that_goes_is_told_and_waited_for() -> None:
    source = Fake()

    async def steps(pilot: Pilot[None], app: Top) -> None:
        source.wrong = "the service ended"
        await until(pilot, lambda: "the service ended" in text(app))
        source.wrong, source.rows = "", [row(77, 1)]
        await until(pilot, lambda: "p77" in text(app))
        assert "the service ended" not in text(app)

    drive(source, steps)


# -- as a user calls it ---------------------------------------------------------------------------------


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([*(p for p in sys.path if p), str(Path(__file__).parents[2])])
    return {k: v for k, v in os.environ.items() if not k.startswith("SAMEPAGE_")} | {"PYTHONPATH": path} | more


def test_without_a_terminal_one_line_says_what_to_do() -> None:
    command = [sys.executable, "-m", "samepage", "top"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "--json" in done.stderr


def test_without_textual_one_line_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import importlib.util, sys; find = importlib.util.find_spec; "
        "importlib.util.find_spec = lambda name, *a: None if name == 'textual' else find(name, *a); "
        "from samepage.commands import main; sys.exit(main(['top']))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "samepage[top]" in done.stderr


@pytest.mark.parametrize("more", [{"TERM": "vt100", "NO_COLOR": "1"}, {"TERM": "xterm-256color"}])
def test_it_runs_in_a_terminal_without_colours_and_quits(tmp_path: Path, more: dict[str, str]) -> None:
    path = str(tmp_path / "socket")
    daemon = [sys.executable, "-m", "samepage", "daemon", "--socket", path]
    with subprocess.Popen(daemon, env=environment(), stdout=subprocess.PIPE) as service:
        assert service.stdout is not None
        service.stdout.readline()
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        top = [sys.executable, "-m", "samepage", "top", "--socket", path]
        with subprocess.Popen(top, env=environment(**more), stdin=theirs, stdout=theirs, stderr=theirs) as process:
            os.close(theirs)
            shown = read(ours, b"no process has joined")
            os.write(ours, b"q")
            shown += read(ours)
            assert process.wait(20) == 0
        service.terminate()
    colours = [part.split(b"m")[0] for part in shown.split(b"\x1b[")[1:] if b"m" in part[:12]]
    assert not [c for c in colours if b"38;" in c or b"48;" in c or c in (b"31", b"32", b"33", b"34")]


def read(fd: int, wanted: bytes | None = None) -> bytes:
    """What a terminal shows until `wanted` comes, or until its end."""
    data, ends = b"", time.monotonic() + 20
    with contextlib.suppress(OSError):  # its other end is closed
        while time.monotonic() < ends and not (wanted and wanted in data):
            if not (part := os.read(fd, 65536)):
                break
            data += part
    assert wanted is None or wanted in data
    return data
