"""Lines on the terminal while a command runs: `samepage run --progress`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from samepage.commands.streams import say
from samepage.service.sockets import ControlError

MIB = 1 << 20

FIRST, LONGEST = 5.0, 60.0
"""Seconds to the first line, and between two lines at most: each comes after twice as long as the one before."""

PATIENCE = 1.0
"""Seconds that the service has to answer."""


class Progress:
    """Says now and then what `told` tells; nothing where stderr is no terminal. Whole lines, for the command writes to
    the same terminal, and a line that is written over would be mixed with its output."""

    def __init__(self, told: Callable[[], str]) -> None:
        self._told = told
        self._wait = FIRST
        self._started = time.monotonic()
        self._due = self._started + FIRST if os.isatty(2) else float("inf")

    def look(self) -> None:
        """To be called often."""
        now = time.monotonic()
        if now >= self._due:
            self._wait = min(2 * self._wait, LONGEST)
            self._due = now + self._wait
            seconds = int(now - self._started)
            say(f"{seconds // 60}:{seconds % 60:02}: {self._told()}")


def progress(wanted: bool, told: Callable[[], str]) -> Callable[[], None] | None:
    """What is to be called often, if progress is wanted."""
    return Progress(told).look if wanted else None


def saved(path: str) -> str:
    """What the private service at `path` says."""
    from samepage.service.control import Client

    try:
        with Client(path, PATIENCE) as client:
            answer = client.ask("status", brief=True)
    except ControlError as e:
        return f"not known what is saved: {e.strerror}"
    return f"{answer['counters']['bytes_saved'] / MIB:.1f} MiB saved, {processes(len(answer.get('processes', [])))}"


def shared(size: int, number: int) -> str:
    """What the command's processes share with whomever."""
    return f"{size / MIB:.1f} MiB shared, {processes(number)}"


def processes(number: int) -> str:
    """So many, in words."""
    return f"{number} process{'' if number == 1 else 'es'}"
