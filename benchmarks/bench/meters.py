"""What the kernel says of a process: its CPU time, its memory."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.memory_cgroup import MemoryCgroup

CPUCLOCK_SCHED = 2


def process_cpu(pid: int) -> float:
    """Seconds of CPU that a process (or a kernel thread) has used, in all its threads, those included that have ended:
    to the nanosecond, by its CPU-time clock (clock_getcpuclockid(3)). OSError EINVAL when it is not there."""
    return time.clock_gettime(~pid << 3 | CPUCLOCK_SCHED)


def threads(pid: int, name: str) -> list[Path]:
    """Those of a process's threads that have this name, in /proc."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if (task / "comm").read_text().strip() == name:
                found.append(task)
    return found


def children(pids: Iterable[int]) -> list[int]:
    """Those that the first threads of processes have forked."""
    return [int(child) for pid in pids for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class AgentCpu:
    """The CPU time of agents: that of their threads, the first number of /proc/PID/task/TID/schedstat, in ns; and that
    of the children that make their steps (run_unstopped() in the agent), in /proc/PID/stat, in ticks of 10 ms, where
    children of the program's that it has waited for would count, too. Both files are kept open."""

    _TICK = 1 / os.sysconf("SC_CLK_TCK")

    def __init__(self, pids: Iterable[int]) -> None:
        pids = list(pids)
        tasks = [task for pid in pids for task in threads(pid, "samepage")]
        self._threads = [os.open(task / "schedstat", os.O_RDONLY) for task in tasks]
        self._processes = [os.open(f"/proc/{pid}/stat", os.O_RDONLY) for pid in pids]

    def seconds(self) -> float:
        """Of all of them together."""
        own = sum(int(os.pread(file, 64, 0).split()[0]) for file in self._threads) / 1e9
        return own + sum(map(self._of_children, self._processes))

    def _of_children(self, file: int) -> float:
        fields = os.pread(file, 1024, 0).rpartition(b") ")[2].split()
        return (int(fields[13]) + int(fields[14])) * self._TICK  # cutime, cstime (proc_pid_stat(5))

    def close(self) -> None:
        for file in self._threads + self._processes:
            os.close(file)


def waited_for() -> float:
    """Seconds of CPU of the children of this process that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _bytes(pid: int, file: str, field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{pid}/{file}").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"the kernel shows no {field} of process {pid}")
    return int(found[1]) << 10


def pss(pids: Iterable[int]) -> int:
    """Bytes: proportional set size of all together. The kernel walks all their pages for it."""
    return sum(_bytes(pid, "smaps_rollup", "Pss") for pid in pids)


def private(pid: int) -> int:
    """Bytes of anonymous memory a process has."""
    return _bytes(pid, "status", "RssAnon")


def available() -> int:
    """Bytes of memory that may still be had in the machine."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def mappings(pids: Iterable[int]) -> int:
    """Mappings of all together."""
    return sum(Path(f"/proc/{pid}/maps").read_text().count("\n") for pid in pids)


class Memory:
    """How much memory processes take, read often and without disturbing them: what their cgroup is charged with, which
    has the kernel's own for their mappings in it. Without a cgroup it is their PSS, which costs more to read."""

    def __init__(self, group: MemoryCgroup | None, pids: list[int]) -> None:
        self._group, self._pids = group, pids

    @property
    def every(self) -> float:
        """Seconds from one reading to the next."""
        return 0.01 if self._group else 0.05

    def used(self) -> int:
        """Bytes."""
        return self._group.usage() if self._group else pss(self._pids)
