"""Runs one program on the same input with samepage and without, and tells all that can be seen of it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

FULL_RATE = [
    *("--memory", "all", "--min-alloc", "64K", "--set", "sleep_millisecs=0"),
    *("--set", "advisor_mode=none", "--set", "pages_to_scan=1000000"),
]
"""As much merging as there can be: every pass follows the last at once, and all memory that can be takes part, from the
first block of 64 KiB on."""

AT_ONCE = """
command=$1; shift
for copy; do
    (cd $copy && exec sh -c "$command") >$copy.out 2>$copy.err </dev/null & pids="$pids $!"
done
for pid in $pids; do wait $pid; echo $?; done
"""
"""A shell script that runs $1 in each of the directories $2… at the same time, and prints the exit statuses."""


@dataclass(frozen=True)
class Program:
    """What to run and what to expect of it. All scripts are sh's.

    `command` runs in a directory of its own that `prepare` made, with the programs `needs` and the Python modules
    `imports`. Whatever `varies` matches, in its output and in the files it leaves, differs between any two runs. Files
    that match the pattern `forget` are not compared. `joins` processes, at least, have allocations of the size that
    samepage merges, and if it `merges`, equal pages are among them for long enough.
    """

    name: str
    command: str
    needs: Sequence[str] = ()
    imports: Sequence[str] = ()
    prepare: str = ":"
    varies: str | None = None
    forget: str | None = None
    joins: int = 0
    merges: bool = False
    timeout: int = 100


@dataclass(frozen=True)
class Outcome:
    """What can be seen of a program: its exit status, what it printed, and a checksum of each file it left."""

    status: int
    output: str
    errors: str
    files: dict[str, str]


@dataclass(frozen=True)
class Report:
    """What `samepage run` said: the last line on its stderr, how many joined, and the peak in --json."""

    line: str
    joined: int
    bytes_saved_peak: int


class Runs:
    """Runs programs, each in a new directory below `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._count = 0
        self._bare: dict[str, Outcome] = {}

    def bare(self, program: Program) -> Outcome:
        """Without samepage; run twice the first time, to prove that two runs do not differ."""
        if program.name not in self._bare:
            first, second = (self.once(program) for _ in range(2))
            assert first == second, f"{program.name} differs from itself, without samepage"
            self._bare[program.name] = first
        return self._bare[program.name]

    def once(self, program: Program) -> Outcome:
        """Without samepage, and only once."""
        work = self._prepared(program, self._directory() / "1")
        done = _run(["sh", "-c", program.command], work, program.timeout)
        return _outcome(program, done.returncode, done.stdout, done.stderr, work)

    def merged(self, program: Program, options: Sequence[str] = ()) -> tuple[Outcome, Report]:
        """Under `samepage run` with these options."""
        directory = self._directory()
        work = self._prepared(program, directory / "1")
        done, report = self._samepage(program, options, ["sh", "-c", program.command], work, directory)
        return _outcome(program, done.returncode, done.stdout, done.stderr, work), report

    def merged_copies(self, program: Program, copies: int, options: Sequence[str] = ()) -> tuple[list[Outcome], Report]:
        """Several copies at once under one `samepage run`."""
        directory = self._directory()
        works = [self._prepared(program, directory / str(copy)) for copy in range(1, copies + 1)]
        command = ["sh", "-c", AT_ONCE, "at-once", program.command, *(work.name for work in works)]
        done, report = self._samepage(program, options, command, directory, directory)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        statuses = [int(line) for line in done.stdout.split()]
        outcomes = [
            _outcome(
                program,
                status,
                work.with_suffix(".out").read_text(errors="replace"),
                work.with_suffix(".err").read_text(errors="replace"),
                work,
            )
            for status, work in zip(statuses, works, strict=True)
        ]
        return outcomes, report

    def _samepage(
        self, program: Program, options: Sequence[str], command: list[str], cwd: Path, directory: Path
    ) -> tuple[subprocess.CompletedProcess[str], Report]:
        """Returns the command's own stderr: our line, the last one, is in the report."""
        file = directory / "report.json"
        samepage = [sys.executable, "-m", "samepage", "run", "--json", str(file), *options, "--"]
        done = _run([*samepage, *command], cwd, program.timeout)
        *errors, line = done.stderr.splitlines(keepends=True)
        assert line.startswith("samepage: "), done.stderr
        done.stderr = "".join(errors)
        joined = re.search(r"in (\d+) process", line)
        counters: dict[str, Any] = json.loads(file.read_text())
        return done, Report(line, int(joined[1]) if joined else 0, counters["bytes_saved_peak"])

    def _directory(self) -> Path:
        self._count += 1
        directory = self._root / str(self._count)
        directory.mkdir()
        return directory

    def _prepared(self, program: Program, work: Path) -> Path:
        for need in program.needs:
            if not (shutil.which(need) or Path(need).exists()):
                pytest.skip(f"{need} is not installed")
        for module in program.imports:
            if not find_spec(module):
                pytest.skip(f"the Python module {module} is not installed")
        work.mkdir()
        done = _run(["sh", "-e", "-c", program.prepare], work, program.timeout)
        assert done.returncode == 0, done.stdout + done.stderr
        return work


def _run(command: list[str], cwd: Path, timeout: int) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SAMEPAGE_", "PYTEST_"))}
    env |= {"LC_ALL": "C.UTF-8", "PYTHON": sys.executable, "HOME": str(cwd)}
    with subprocess.Popen(
        command,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # its children, too
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _outcome(program: Program, status: int, output: str, errors: str, work: Path) -> Outcome:
    def same(text: str) -> str:
        text = text.replace(str(work), "WORK")
        return re.sub(program.varies, "", text, flags=re.MULTILINE) if program.varies else text

    files = {}
    for path in _files(work):
        name = str(path.relative_to(work))
        if program.forget and re.search(program.forget, name):
            continue
        files[name] = os.readlink(path) if path.is_symlink() else hashlib.sha256(path.read_bytes()).hexdigest()
    shutil.rmtree(work)
    return Outcome(status, same(output), same(errors), files)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file())
