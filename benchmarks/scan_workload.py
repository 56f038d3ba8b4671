"""Real programs, stopped in the middle of their work, to compare what `samepage scan` predicts with what comes of it.

Two numpy processes that loaded the same table, sqlite with its database in memory, git repacking a repository, gcc
compiling; two of each, so that there is something to merge between them, and all different, so that there is something
that is not.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PR_SET_MEMORY_MERGE = 67
"""prctl(2), Linux 6.4: all memory of the process is mergeable, and of those it executes and forks."""

NUMPY = """
import sys, time
import numpy as np
common, own = (np.random.default_rng(seed) for seed in (1, int(sys.argv[1])))
table = common.integers(0, 256, {mebibytes} << 20, np.uint8)
mine = own.standard_normal(({mebibytes} << 20) // 16)
counts = np.zeros(({mebibytes} << 20) // 4, np.int32); counts[:: 1 << 12] = 1
words = [f"word number {{i}}" * 3 for i in range(60_000)]
print("ready", flush=True)
time.sleep(3600)
"""

SQL = """
create table t(id integer primary key, name text, payload blob);
with recursive n(i) as (select 1 union all select i + 1 from n where i < {rows})
insert into t select i, 'row number ' || (i * 7919 % {rows}), zeroblob(300) from n;
create index by_name on t(name);
.print ready
.shell sleep 3600
"""


class Missing(Exception):
    """A program that the workload needs is not there."""


class Workload:
    """The processes, from when all were ready."""

    def __init__(self, directory: Path, mebibytes: int, mergeable: bool) -> None:
        for program in ("sqlite3", "git", "gcc"):
            if not shutil.which(program):
                raise Missing(f"{program} is not installed")
        self._directory, self._mergeable = directory, mergeable
        self._groups: list[subprocess.Popen[str]] = []
        for i in range(2):
            self._start([sys.executable, "-c", NUMPY.format(mebibytes=mebibytes), str(10 + i)], ready=True)
            self._start(["sqlite3", "-batch", ":memory:", SQL.format(rows=mebibytes * 1000)], ready=True, stdin=SQL)
        self._git()
        self._gcc()

    def _start(self, command: list[str], ready: bool, stdin: str | None = None) -> None:
        if stdin is not None:
            command, stdin = command[:-1], command[-1]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if ready else subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=self._directory,
            preexec_fn=_merge_any if self._mergeable else None,  # one thread
            start_new_session=True,
        )
        self._groups.append(process)
        if stdin is not None:
            assert process.stdin is not None
            process.stdin.write(stdin)
            process.stdin.flush()
        if ready:
            assert process.stdout is not None
            if process.stdout.readline().strip() != "ready":
                raise RuntimeError(f"{command[0]} did not get ready")

    def _git(self) -> None:
        """A repository of some thousand files, repacked again and again by two processes with threads."""
        repository = self._directory / "repository"
        subprocess.run(["git", "init", "-q", repository], check=True)
        text = "".join(f"line {i} of a file that changes little from one to the next\n" for i in range(300))
        for i in range(1500):
            (repository / f"file{i}").write_text(text.replace("line 7 ", f"line {i * 31} "))
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", "-C", repository, "add", "."], check=True)
        subprocess.run(["git", "-C", repository, *identity, "commit", "-qm", "all"], check=True)
        pack = (
            f"while :; do git -C {repository} pack-objects --all --no-reuse-delta --stdout </dev/null >/dev/null; done"
        )
        for _ in range(2):
            self._start(["sh", "-c", pack], ready=False)

    def _gcc(self) -> None:
        """A file of many functions, compiled again and again, by two gcc at a time."""
        source = self._directory / "many.c"
        functions = "\n".join(
            f"int f{i}(int *a, int n)"
            f"{{ int s = {i}; for (int j = 0; j < n; j++) s += a[j] * {i + 3} ^ (s >> {i % 13}); return s; }}"
            for i in range(3000)
        )
        source.write_text(functions)
        for _ in range(2):
            self._start(["sh", "-c", f"while :; do gcc -O2 -S -o /dev/null {source}; done"], ready=False)

    @property
    def steady(self) -> list[int]:
        """The pids of the programs that have done their work and wait."""
        return [group.pid for group in self._groups if group.stdout is not None]

    def stop(self) -> list[int]:
        """Stop everything, and wait until it is; the pids of all that has memory."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for group in self._groups:
                os.killpg(group.pid, signal.SIGSTOP)
            pids = [pid for pid, state in self._members() if state != "Z"]
            states = [state for _, state in self._members() if state != "Z"]
            if all(state == "T" for state in states) and pids == [p for p, s in self._members() if s != "Z"]:
                return pids
            time.sleep(0.05)
        raise RuntimeError("the processes would not stop")

    def _members(self) -> list[tuple[int, str]]:
        groups = {group.pid for group in self._groups}
        found = []
        for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
            with contextlib.suppress(OSError):
                state, _, group, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                if int(group) in groups:
                    found.append((pid, state))
        return found

    def kill(self) -> None:
        """End everything, and wait until it has."""
        for group in self._groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group.pid, signal.SIGKILL)
        for group in self._groups:
            group.wait()
            for pipe in (group.stdin, group.stdout):
                if pipe:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()


def _merge_any() -> None:
    ctypes.CDLL(None).prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0)


@contextlib.contextmanager
def running(directory: Path, mebibytes: int, mergeable: bool = False) -> Iterator[Workload]:
    """The workload, and its end whatever happens. `mergeable`: to the kernel's KSM. `Missing` when a program is not
    installed."""
    workload = Workload(directory, mebibytes, mergeable)
    try:
        yield workload
    finally:
        workload.kill()
