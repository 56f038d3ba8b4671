"""Starting the processes of benchmarks and tests: a service, and workers that do as they are told."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.memory_cgroup import MemoryCgroup
from samepage import agent


def environment(**more: str) -> dict[str, str]:
    """This process's, without a service."""
    path = os.pathsep.join(filter(None, sys.path))
    own = {k: v for k, v in os.environ.items() if not k.startswith("SAMEPAGE_SOCKET") and k != "LD_PRELOAD"}
    return own | {"PYTHONPATH": path} | more


class Commanded:
    """A process that does as it is told on stdin, one JSON list a line, and answers so; it speaks first, when it is
    ready, and its constructor does not wait for that.

    In a cgroup if `group` is one; under the agent if `socket` is a service's.
    """

    def __init__(
        self, command: list[str], group: MemoryCgroup | None = None, socket: str | None = None, **more: str
    ) -> None:
        loaded = {"LD_PRELOAD": str(agent.library_path()), "SAMEPAGE_SOCKET": socket} if socket else {}
        enter = group.enter() if group else []
        # The agent is for the worker, not for the shell that takes it into the cgroup.
        prefix = ["env", *(f"{name}={value}" for name, value in loaded.items())]
        self.process = subprocess.Popen(
            [*enter, *prefix, *command],
            env=environment(**more),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def tell(self, *command: Any) -> None:
        """Say what to do, and do not wait."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def ask(self, *command: Any) -> Any:
        """Have something done. EOFError when the process was killed."""
        with contextlib.suppress(BrokenPipeError):
            self.tell(*command)
        return self.answer()

    def answer(self) -> Any:
        """To what it was told last, or that it is ready. EOFError when the process ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EOFError(f"the worker ended with {self.process.wait()}")
        return json.loads(line)

    def leave(self) -> None:
        """Have it end by itself, as it does when its input ends."""
        self.process.communicate()

    def end(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.communicate()


def end(process: subprocess.Popen[Any], seconds: float = 10.0) -> None:
    """By SIGTERM. TimeoutExpired when that took too long, and it was killed."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise


@contextlib.contextmanager
def service(folder: Path, *options: str) -> Iterator[str]:
    """`samepage daemon`; yields where it listens."""
    path = str(folder / "socket")
    command = [sys.executable, "-m", "samepage", "daemon", "--socket", path, *options]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout is not None
        try:
            assert "listening" in daemon.stdout.readline()
            yield path
        finally:
            daemon.terminate()


def wait_until(done: Callable[[], bool], what: str, seconds: float = 300.0, every: float = 0.05) -> None:
    """TimeoutError when it does not come about."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not {what} in {seconds:.0f} seconds")
        time.sleep(every)
