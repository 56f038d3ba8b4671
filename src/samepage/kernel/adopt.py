"""Attaching to those processes of a command that have no agent (`samepage run --engine auto`).

Which these will be cannot be known beforehand: what is inherited over fork and exec (PR_SET_MEMORY_MERGE, LD_PRELOAD) a
shell hands to static and dynamic programs alike. So samepage looks for new processes. It attaches to a process that has
some memory but no agent when it is seen for the second time in the same program. What an attached process executes
inherits the flag: an agent that finds it takes over, and switches it off (initialise() in agent/hooks/wrappers.c).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
from typing import Any, NoReturn

from samepage.kernel.attach import attach, release_unmerged
from samepage.kernel.rows import anonymous_pages, is_mergeable
from samepage.kernel.settings import Settings, SettingsError, start_time
from samepage.kernel.target import TargetError, has_agent
from samepage.process.identity import identify
from samepage.service.log import log
from samepage.service.machine import is_marked
from samepage.service.private import leave_the_terminal

LOOK_EVERY = 0.25
"""Seconds between two looks."""

LEAST = 256
"""A process with fewer pages of anonymous memory is left alone. (An agent joins when 1 MiB is allocated.)"""

FINISH_TIMEOUT = 10.0
"""Seconds that the last look may take: it may have to wait for a process that does not return from the kernel."""

Program = tuple[int, int]
"""When a process started, and where its stack begins: every exec chooses a new place."""


class Adopter:
    """Looks at processes that `variable` marks as the command's. It does so in a separate process: a process that is
    both tracer and parent would get as one the wait results that it waits for as the other; and holding a process may
    take seconds."""

    def __init__(self, settings: Settings, variable: tuple[str, str]) -> None:
        self._settings, self._variable = settings, variable
        self._parent = os.getpid()
        self._since = start_time(self._parent) or 0
        self._known: dict[int, bool] = {}
        self._seen: dict[int, Program] = {}
        self._done: dict[int, Program] = {}
        self.attached: set[int] = set()
        self.refused: dict[int, str] = {}
        """Why processes were left alone."""

    def start(self) -> None:
        """Start the process. It ends with `finish`, or when this process is killed."""
        self._line, line = socket.socketpair()
        self._pid = os.fork()
        if self._pid == 0:
            self._line.close()
            self._run(line)
        line.close()

    def finish(self) -> None:
        """Take over what it found."""
        with contextlib.suppress(OSError, ValueError):
            self._line.settimeout(FINISH_TIMEOUT)
            self._line.shutdown(socket.SHUT_WR)
            with self._line.makefile() as told:
                found: dict[str, Any] = json.load(told)
            self.attached = set(found["attached"])
            self.refused = {int(pid): why for pid, why in found["refused"].items()}
        self._line.close()
        with contextlib.suppress(OSError):
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)

    def _run(self, line: socket.socket) -> NoReturn:
        """What the forked process does."""
        try:
            leave_the_terminal()
            while not select.select([line], [], [], LOOK_EVERY)[0]:
                self.look()
            line.sendall(json.dumps({"attached": sorted(self.attached), "refused": self.refused}).encode())
        except BrokenPipeError:
            pass
        except BaseException as e:
            with contextlib.suppress(BaseException):
                log(f"no process is attached to any more: {e!r}")
        finally:
            os._exit(0)

    def look(self) -> None:
        """Attach to the processes that have been here long enough."""
        pids = [int(entry) for entry in os.listdir("/proc") if entry.isdecimal()]
        self._known = {pid: self._known[pid] if pid in self._known else self._is_ours(pid) for pid in pids}
        for pid in (pid for pid, ours in self._known.items() if ours and anonymous_pages(pid) >= LEAST):
            with contextlib.suppress(OSError):
                self._consider(pid)

    def _is_ours(self, pid: int) -> bool:
        started = start_time(pid)
        return started is not None and started >= self._since and is_marked(pid, self._variable, self._parent)

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
