"""Whether the kernel says that a process can answer at all: one that is stopped, traced or frozen cannot. The process
itself is not asked. It may influence what is found here, but that concerns only itself.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

STOPPED, TRACED, FROZEN = "stopped", "traced", "frozen"
SILENT = "silent"
"""It runs, but has not answered yet."""

THREAD_NAME = b"samepage\n"
"""The name that an agent gives its thread (`thread_settle()` in agent/thread/thread.c)."""


@dataclass(frozen=True, slots=True)
class Halt:
    """What keeps a thread from running. `switches`: how often it has been taken off a CPU. A thread that somebody
    traces stops for a moment at every system call; when the same number is seen twice, it did not run in between."""

    why: str
    switches: int


def agent_thread(pid: int) -> int:
    """The thread of a process that answers; its first one if none looks like it."""
    with contextlib.suppress(OSError):
        for tid in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/task/{tid}/comm").read_bytes() == THREAD_NAME:
                    return int(tid)
    return pid


def halt_of(pid: int, tid: int) -> Halt | None:
    """What keeps a thread from running at this moment; None: nothing, or there is no such thread."""
    task = f"/proc/{pid}/task/{tid}"
    try:
        lines = Path(f"{task}/status").read_bytes().split(b"\n")
    except OSError:
        return None
    said = dict(
        line.split(b":\t", 1) for line in lines if line.startswith((b"State:\t", b"voluntary", b"nonvoluntary"))
    )
    state = said.get(b"State", b"")[:1]
    switches = sum(int(said.get(name, b"0")) for name in (b"voluntary_ctxt_switches", b"nonvoluntary_ctxt_switches"))
    if state == b"T":
        return Halt(STOPPED, switches)
    if state == b"t":
        return Halt(TRACED, switches)
    # A thread in a frozen cgroup looks asleep.
    if state in (b"S", b"D") and _is_frozen(f"{task}/cgroup"):
        return Halt(FROZEN, switches)
    return None


@dataclass(frozen=True, slots=True)
class Work:
    """Signs that a process gets on: `runnable`, whether a thread wants to run, or waits inside the kernel; `ticks`, the
    CPU time of all threads of the process so far, in hundredths of a second."""

    runnable: bool
    ticks: int

    def gets_on(self, before: Work | None) -> bool:
        """Whether it seems to have got on since."""
        return self.runnable or (before is not None and self.ticks > before.ticks)


def work_of(pid: int, tid: int) -> Work | None:
    """None: there is no such process or thread."""
    try:
        whole = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        state = Path(f"/proc/{pid}/task/{tid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except OSError:
        return None
    return Work(state in (b"R", b"D"), int(whole[11]) + int(whole[12]))


def kept_from_cpu(pid: int, tid: int) -> float:
    """Seconds for which a thread wanted to run so far, and had no CPU (sched-stats.rst); 0.0 if there is none such."""
    try:
        return int(Path(f"/proc/{pid}/task/{tid}/schedstat").read_bytes().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def _is_frozen(path: str) -> bool:
    """Whether the cgroup that a file of /proc names, or one above it, is frozen."""
    with contextlib.suppress(OSError):
        for _, controllers, group in cgroups(path):
            if not controllers and _says(_mounts()[1], group, "cgroup.events", "frozen 1"):
                return True
            if controllers == "freezer" and _says(_mounts()[0], group, "freezer.state", "FROZEN", "FREEZING"):
                return True
    return False


def cgroups(path: str) -> Iterator[tuple[str, str, str]]:
    """The lines of /proc/PID/cgroup: hierarchy, controllers, path. OSError.

    Users name the cgroups that were delegated to them, with any bytes but a slash and a newline."""
    for line in lines_of(path):
        hierarchy, controllers, group = line.split(":", 2)
        yield hierarchy, controllers, group


def cgroups_of(pid: int) -> list[tuple[str, str, str]]:
    """The cgroups of a process, as `cgroups` has them. OSError.

    Those of its first thread; where that has ended and others run on, of one of these. What has ended the kernel shows
    at the root of version 1's hierarchies, and in version 2's where it was, wherever the process is by now."""
    found = list(cgroups(f"/proc/{pid}/cgroup"))
    if _has_ended(f"/proc/{pid}"):
        for tid in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                those = list(cgroups(f"/proc/{pid}/task/{tid}/cgroup"))
                if not _has_ended(f"/proc/{pid}/task/{tid}"):
                    return those
    return found


def _has_ended(thread: str) -> bool:
    return Path(f"{thread}/stat").read_bytes().rpartition(b")")[2].split()[0] in (b"Z", b"X")


def lines_of(path: str) -> list[str]:
    """The lines of a file of the kernel's, in which names may be anything: `os.fsencode` gives their bytes. OSError."""
    return os.fsdecode(Path(path).read_bytes()).rstrip("\n").split("\n")


def _says(mount: tuple[str, str] | None, group: str, name: str, *lines: str) -> bool:
    if mount is None:
        return False
    root, point = mount
    inside = group.removeprefix(root) if root != "/" else group
    try:
        return not set(lines).isdisjoint(lines_of(f"{point}{inside.rstrip('/')}/{name}"))
    except OSError:  # the root of the hierarchy has no such file; nor has a kernel before 5.2
        return False


@functools.lru_cache(maxsize=1)
def _mounts() -> tuple[tuple[str, str] | None, tuple[str, str] | None]:
    """Where the freezer of cgroup v1 and the hierarchy of v2 are mounted: (what of them, where)."""
    v1 = v2 = None
    with contextlib.suppress(OSError):
        for line in lines_of("/proc/self/mountinfo"):
            mount, _, kind = line.partition(" - ")
            root, point = mount.split(" ")[3:5]
            name, _, options = kind.split(" ", maxsplit=2)
            if name == "cgroup" and "freezer" in options.split(","):
                v1 = (root, point)
            elif name == "cgroup2":
                v2 = (root, point)
    return v1, v2
