"""Which engine serves which kind of program under `samepage run --engine auto`: never both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
MIB = 4


@contextmanager
def auto(folder: Path, *command: str) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """The command at work; yields what asks for the rows of `samepage status`."""
    script = f'echo "$SAMEPAGE_SOCKET" > {folder}/name; mv {folder}/name {folder}/socket; exec "$@"'
    whole = [
        sys.executable,
        "-m",
        "samepage",
        "run",
        "--engine",
        "auto",
        "--memory",
        "mapped",
        "--",
        "sh",
        "-c",
        script,
        "sh",
        *command,
    ]
    with kernel_ksm.borrowed(run=0, **kernel_ksm.DEFAULTS):
        run = subprocess.Popen(whole, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            wait_until((folder / "socket").exists, "started", 30)
            path = (folder / "socket").read_text().strip()
            yield lambda: json.loads(samepage("status", "--json", "--socket", path).stdout)["processes"]
        finally:
            run.communicate(timeout=30)


def served(rows: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """Checks that nobody is served twice."""
    for row in rows:
        assert mergeable(row["pid"]) == (row["engine"] == "kernel")
        assert has_agent(row["pid"]) == (row["engine"] == "user")
    pids = [row["pid"] for row in rows]
    assert len(pids) == len(set(pids))
    return [(row["pid"], row["engine"]) for row in rows]


def has_agent(pid: int) -> bool:
    return "libsamepage" in Path(f"/proc/{pid}/maps").read_text()


def owned(program: Path, user: int, group: int, mode: int) -> str:
    os.chown(program, user, group)
    program.chmod(mode)
    return str(program)


def setgid(folder: Path) -> list[str]:
    return [owned(compile_c(HERE / "holder.c", folder / "holder"), 0, 1, 0o2755)]


def static(folder: Path) -> list[str]:
    return [str(compile_c(HERE / "holder.c", folder / "holder", "-static"))]


@pytest.mark.parametrize("kind", [static, setgid])
def test_a_program_that_the_agent_cannot_be_in_is_served_by_the_kernel_alone(
    tmp_path: Path, kind: Callable[[Path], list[str]]
) -> None:
    with auto(tmp_path, *kind(tmp_path), str(MIB)) as rows:
        wait_until(lambda: "kernel" in [by for _, by in served(rows())], "served by the kernel", 30, every=0.3)
        assert {by for _, by in served(rows())} == {"kernel"}
