"""Attaching to those processes of a command that the agent is not in (`samepage run --engine auto`).

Which these will be cannot be said beforehand: what is inherited over fork and exec (PR_SET_MEMORY_MERGE, LD_PRELOAD) a
shell gives to static and dynamic programs alike. So it is looked which have come, and who has no agent when it is seen
for the second time in the same program, and some memory, is attached to. What an attached process executes inherits the
flag: an agent that finds it takes over, and switches it off (initialise() in agent/wrappers.c).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable

from samepage.kernel.attach import attach, release_unmerged
from samepage.kernel.rows import anonymous_pages, is_mergeable
from samepage.kernel.settings import Settings, SettingsError
from samepage.kernel.target import TargetError, has_agent
from samepage.memory.identity import identify

LOOK_EVERY = 0.25
"""Seconds between two looks."""

LEAST = 256
"""Pages of anonymous memory that a process has, or is left alone: an agent joins for an allocation of 1 MiB."""

Program = tuple[int, int]
"""When a process started, and where its stack begins, which every exec chooses anew."""


class Adopter:
    """Looks from a thread of its own, for to hold a process may take seconds. `ours`: whether a process is the
    command's."""

    def __init__(self, settings: Settings, ours: Callable[[int], bool]) -> None:
        self._settings, self._ours = settings, ours
        self._known: dict[int, bool] = {}
        self._seen: dict[int, Program] = {}
        self._done: dict[int, Program] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="adopter", daemon=True)
        self.attached: set[int] = set()
        self.refused: dict[int, str] = {}
        """Why processes were left alone."""

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._thread.join(2 * LOOK_EVERY)

    def _run(self) -> None:
        while not self._ended.wait(LOOK_EVERY):
            self.look()

    def look(self) -> None:
        """Attach to those that have been here for long enough."""
        pids = [int(entry) for entry in os.listdir("/proc") if entry.isdecimal()]
        self._known = {pid: self._known[pid] if pid in self._known else self._ours(pid) for pid in pids}
        for pid in (pid for pid, ours in self._known.items() if ours and anonymous_pages(pid) >= LEAST):
            with contextlib.suppress(OSError):
                self._consider(pid)

    def _consider(self, pid: int) -> None:
        who = identify(pid)
        program = (who.started, who.stack)
        if self._done.get(pid) == program:
            return
        if self._seen.get(pid) != program:
            self._seen[pid] = program
            return
        self._done[pid] = program
        if has_agent(pid):
            return
        try:
            if not is_mergeable(pid):  # as a child of one that is
                attach(pid)
            self.attached.add(pid)
            self.refused.pop(pid, None)
        except TargetError as e:
            self.refused[pid] = str(e)
            return
        if has_agent(pid):  # it executed another program just then
            release_unmerged(pid)
        with contextlib.suppress(SettingsError):  # ksmd goes on for it when this process is killed
            self._settings.hold([pid], {})
