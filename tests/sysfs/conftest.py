"""A daemon with its tree mounted, and processes for it to merge. Real mounts, so most of this needs /dev/fuse."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from samepage.sysfs import mount
from tests.service import fake_agent

KSM = Path("/sys/kernel/mm/ksm")
DEADLINE = 60.0
"""Seconds until it counts as never."""


def unmountable() -> str | None:
    """Why this user cannot mount the tree, if so."""
    if not mount.PROGRAM.exists():
        return "needs samepage-sysfs: built where libfuse3-dev and libjansson-dev are installed"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "needs /dev/fuse"
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        return "needs fusermount3 (fuse3), or root"
    return None


needs_fuse = pytest.mark.skipif(unmountable() is not None, reason=unmountable() or "")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def until(what: Callable[[], object], why: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not what():
        assert time.monotonic() < deadline, why
        time.sleep(0.02)


def mounted(directory: Path) -> bool:
    """Whether anything is mounted there, or was and is dead."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return str(directory) in points


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([*(p for p in sys.path if p), str(Path(__file__).parents[2])])
    return {k: v for k, v in os.environ.items() if not k.startswith("SAMEPAGE_")} | {"PYTHONPATH": path} | more


def attempt(what: Callable[..., object], *arguments: object) -> object:
    """What it returns, or the name of the errno it raises."""
    try:
        return what(*arguments)
    except OSError as e:
        return errno.errorcode[e.errno or 0]


class Tree:
    """A daemon, process `process` at `socket`, and where its files are."""

    def __init__(self, folder: Path) -> None:
        self.socket = str(folder / "socket")
        self.path = folder / "tree"
        self.path.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "samepage", "daemon", "--socket", self.socket, "--mount", str(self.path)]
        self.process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"samepage: listening at {self.socket}\n"
        self._agents: list[subprocess.Popen[str]] = []

    def read(self, name: str) -> str:
        return (self.path / name).read_text()

    def write(self, name: str, text: str) -> None:
        (self.path / name).write_text(text)

    def join(self, seed: int, npages: int, *lie: str) -> int:
        """Have a process join, whose pages are made from `seed`; returns its pid."""
        command = [sys.executable, fake_agent.__file__, self.socket, str(seed), str(npages), *lie]
        agent = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
        self._agents.append(agent)
        assert agent.stdout is not None
        assert agent.stdout.readline() == "joined\n"
        return agent.pid

    def merge(self, npages: int, *lie: str) -> list[int]:
        """Have two processes share `npages` pages; returns their pids."""
        pids = [self.join(1, npages, *lie) for _ in range(2)]
        until(lambda: self.read("pages_sharing") == f"{npages}\n", "not merged")
        return pids

    def server(self) -> int:
        """The pid of the process that serves the files."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        (pid,) = [int(c) for c in children if Path(f"/proc/{c}/comm").read_text() == "samepage-sysfs\n"]
        return pid

    def end(self) -> None:
        for agent in self._agents:
            agent.kill()
            agent.communicate()
        self.process.kill()
        self.process.communicate()
        with contextlib.suppress(AssertionError):
            until(lambda: not mounted(self.path), "still mounted")


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    tree = Tree(tmp_path)
    yield tree
    tree.end()
