"""Which processes and files are to be looked at: by number, by path, by cgroup, by name, or all."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from samepage.estimate.image import Image
from samepage.estimate.process import PageFlags, Process
from samepage.estimate.source import ScanError, Source

CGROUP_ROOTS = ("/sys/fs/cgroup", "/sys/fs/cgroup/memory", "/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified")


class Selection:
    """What was asked for. `sources` in the order in which it was, each once, then the processes by their numbers.

    `optional`: processes that were found, not named: of those, one that may not be looked at is no failure.
    """

    def __init__(self, page_flags: PageFlags) -> None:
        self._page_flags = page_flags
        self._sources: dict[int | str, Source] = {}
        self.optional: set[int] = set()

    @property
    def sources(self) -> list[Source]:
        files = [source for source in self._sources.values() if source.pid is None]
        # A parent mostly has a lower number than its children: pages they share are then met in the parent.
        processes = sorted((s for s in self._sources.values() if s.pid is not None), key=lambda s: s.pid or 0)
        return [*processes, *files]

    def add(self, target: str) -> None:
        """A process by its number, else a file by its path (a file whose name is a number: ./NUMBER)."""
        if target.isdecimal():
            self._process(int(target))
            self.optional.discard(int(target))
        else:
            path = os.path.realpath(target)
            self._sources.setdefault(path, Image(target))

    def add_all(self) -> None:
        """Every process but this one."""
        self._found(_pids())

    def add_cgroup(self, path: str) -> None:
        """The processes of a cgroup and of those below it. ScanError when there is no such cgroup."""
        directory = _cgroup(path)
        pids: set[int] = set()
        for below, _, names in os.walk(directory):
            if "cgroup.procs" in names:
                try:
                    pids.update(map(int, (Path(below) / "cgroup.procs").read_text().split()))
                except OSError:  # removed meanwhile, or a threaded cgroup, whose processes its parent has
                    continue
        self._found(pids - {0})  # 0: of a pid namespace that is not ours

    def add_name(self, pattern: str) -> None:
        """Processes whose comm, or the name of whose program, matches a shell pattern. ScanError when there is none."""
        pids = [pid for pid in _pids() if any(fnmatch.fnmatchcase(name, pattern) for name in _names(pid))]
        if not pids:
            raise ScanError(f"no process is called {pattern}")
        self._found(pids)

    def _found(self, pids: Iterable[int]) -> None:
        for pid in sorted(pids):
            if pid != os.getpid():  # which changes as it looks
                if pid not in self._sources:
                    self.optional.add(pid)
                self._process(pid)

    def _process(self, pid: int) -> None:
        self._sources.setdefault(pid, Process(pid, self._page_flags))


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdecimal())


def _names(pid: int) -> Iterator[str]:
    try:
        yield Path(f"/proc/{pid}/comm").read_text(errors="replace").rstrip("\n")
        yield os.path.basename(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace"))
    except OSError:
        return


def _cgroup(path: str) -> Path:
    candidates = [path] if path.startswith(CGROUP_ROOTS) else [f"{root}/{path.strip('/')}" for root in CGROUP_ROOTS]
    for candidate in candidates:
        if (Path(candidate) / "cgroup.procs").exists():
            return Path(candidate)
    raise ScanError(f"no such cgroup: {path}")
