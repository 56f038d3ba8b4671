"""Which engine serves which kind of program under `samepage run --engine auto`: one, and never both."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kernel_ksm
from benchmarks.processes import wait_until
from tests.agent.preload import compile_c
from tests.kernel.conftest import mergeable, needs_ksm, samepage

pytestmark = needs_ksm

HERE = Path(__file__).parent
MIB = 20
"""The agent of a process that maps less than 16 MiB by itself does nothing."""

OTHER = 1
"""A user that is not root."""

TWICE = 'exec 3<&0; "$@" <&3 >/dev/null & exec "$@"'
"""Of another user's process the service is told only what is merged, so there are two with the same memory. Both end
when stdin does."""


class Command:
    """A command under `samepage run --engine auto`."""

    def __init__(self, folder: Path, command: list[str]) -> None:
        script = f'echo "$SAMEPAGE_SOCKET" > {folder}/name; mv {folder}/name {folder}/socket; exec "$@"'
        run = [sys.executable, "-m", "samepage", "run", "--engine", "auto", "--"]
        run += ["sh", "-c", script, "sh", *command]
        pipe = subprocess.PIPE
        self._run = subprocess.Popen(run, stdin=pipe, stdout=subprocess.DEVNULL, stderr=pipe, text=True)
        wait_until((folder / "socket").exists, "started", 30)
        self._socket = (folder / "socket").read_text().strip()

    def served(self) -> dict[int, str]:
        """By which engine each process is served, as `samepage status` has it, and as the processes have it."""
        status = json.loads(samepage("status", "--json", "--socket", self._socket).stdout)
        rows: list[dict[str, Any]] = status["processes"]
        by = {row["pid"]: row["engine"] for row in rows}
        assert len(by) == len(rows)
        # Status may be a second old.
        return {pid: engine for pid, engine in by.items() if engine == engine_in(pid)}

    def wait_served(self, engine: str, processes: int = 1) -> dict[int, str]:
        """Until so many are served, all by that engine."""
        wait_until(lambda: list(self.served().values()) == [engine] * processes, f"served by {engine}", 30, every=0.3)
        return self.served()

    def tell(self) -> None:
        assert self._run.stdin is not None
        print(file=self._run.stdin, flush=True)

    def end(self) -> None:
        self._run.communicate(timeout=30)


def engine_in(pid: int) -> str:
    """Which can merge a process, by what it is."""
    engines = {"kernel": mergeable(pid), "user": "libsamepage" in Path(f"/proc/{pid}/maps").read_text()}
    return " and ".join(engine for engine, can in engines.items() if can)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where every user may execute."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@contextmanager
def auto(folder: Path, *command: str) -> Iterator[Command]:
    with kernel_ksm.borrowed(run=0, **kernel_ksm.DEFAULTS):
        started = Command(folder, list(command))
        try:
            yield started
        finally:
            started.end()


def needed(program: str) -> None:
    if not shutil.which(program):
        pytest.skip(f"needs {program}")


def owned(program: Path, user: int, group: int, mode: int) -> str:
    os.chown(program, user, group)
    program.chmod(mode)
    return str(program)


def plain(folder: Path) -> list[str]:
    return [str(compile_c(HERE / "holder.c", folder / "holder"))]


def of_musls(folder: Path) -> list[str]:
    needed("musl-gcc")
    return [str(compile_c(HERE / "holder.c", folder / "holder", compiler="musl-gcc"))]


def static(folder: Path) -> list[str]:
    return [str(compile_c(HERE / "holder.c", folder / "holder", "-static"))]


def setuid(folder: Path) -> list[str]:
    return [owned(Path(plain(folder)[0]), OTHER, 0, 0o4755)]


def setgid(folder: Path) -> list[str]:
    return [owned(Path(plain(folder)[0]), 0, OTHER, 0o2755)]


def capabilities(folder: Path) -> list[str]:
    needed("setcap")
    (program,) = plain(folder)
    subprocess.run(["setcap", "cap_net_raw+ep", program], check=True)
    return ["setpriv", f"--reuid={OTHER}", f"--regid={OTHER}", "--clear-groups", program]


@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        (plain, "user"),
        (of_musls, "user"),
        (static, "kernel"),
        (setuid, "kernel"),
        (setgid, "kernel"),
        (capabilities, "kernel"),
    ],
)
def test_a_program_is_the_agents_if_that_can_be_in_it_and_else_the_kernels(
    folder: Path, kind: Callable[[Path], list[str]], engine: str
) -> None:
    with auto(folder, "sh", "-c", TWICE, "sh", *kind(folder), str(MIB)) as command:
        command.wait_served(engine, 2)


def in_c(folder: Path) -> str:
    return str(compile_c(HERE / "becomes.c", folder / "static", "-static"))


def in_go(folder: Path) -> str:
    needed("go")
    environment = os.environ | {"CGO_ENABLED": "0", "GOCACHE": str(folder / "cache"), "GOFLAGS": "-mod=mod"}
    build = ["go", "build", "-o", str(folder / "static"), str(HERE / "becomes.go")]
    subprocess.run(build, env=environment, check=True)
    return str(folder / "static")


@pytest.mark.parametrize("built", [in_c, in_go])
def test_what_a_process_becomes_is_served_by_the_other_engine(folder: Path, built: Callable[[Path], str]) -> None:
    """A static program becomes a dynamic one, which inherits that the kernel merges it: its agent switches that off.
    That one becomes the static one again."""
    statically = built(folder)
    dynamically = str(compile_c(HERE / "becomes.c", folder / "dynamic"))
    with auto(folder, statically, dynamically, statically, "/nothing") as command:
        first = command.wait_served("kernel")
        command.tell()
        assert command.wait_served("user").keys() == first.keys()
        command.tell()
        assert command.wait_served("kernel").keys() == first.keys()
