"""Who merges: the seam between the service and what merges for it.

There are two engines: ksmd with its agents (`samepage.service.scanner`), and the kernel's own KSM
(`samepage.kernel.engine`). Everything that a service shows and does goes through this. The command that starts the
service chooses the engines (`samepage.commands.engines`). Only one of them serves a process.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from samepage.service.control import Arrivals

Answer = dict[str, Any]
Progress = Callable[[Answer], None]
Cancelled = Callable[[], bool]


class Engine(Protocol):
    """Who merges. Rows have at least `pid`, `comm`, `domain`, `owner`, `merged` and `bytes_needed`; counters have KSM's
    names."""

    name: str

    def counters(self, owner: str | None = None) -> dict[str, Any]:
        """The counters of everything, or of one owner."""

    def rows(self) -> list[Answer]:
        """A row for each process."""

    def commitments(self) -> list[Answer]:
        """The same, with the memory cgroup (`cgroup`) of each and the bytes available there (`bytes_available`)."""

    def row(self, pid: int) -> Answer | None:
        """The row of one process; None if this engine does not serve it."""

    def files(self) -> dict[str, str]:
        """What is in the files of /sys/kernel/mm/ksm."""

    def knobs(self) -> dict[str, str]:
        """All knobs."""

    def get(self, knob: str) -> str:
        """The value of a knob. Raises OSError EINVAL if there is no such knob."""

    def set(self, knob: str, value: str, cancelled: Cancelled) -> None:
        """Set a knob. Raises OSError. `run` = 2 returns when everything is unmerged, or could not be; `run` is 0
        then."""

    def unmerge(self, pids: list[int], progress: Progress, cancelled: Cancelled) -> Answer:
        """Unmerge these processes, or all. The answer has `ok`, `errno` (a name), `pages_unmerged`, `pages_remaining`,
        `bytes_needed`, `bytes_available`, `limits_unseen`, and in `failed` a row for each process that caused an error.
        Raises OSError ESRCH if this engine does not serve one of them."""


class Agents(Engine, Protocol):
    """The engine of processes that join."""

    def pids(self) -> list[int]: ...
    def introductions(self) -> contextlib.AbstractContextManager[Arrivals]: ...
    def merge(self, pid: int, vpn: int, npages: int, owner: str | None = None) -> Answer: ...


class Engines:
    """Several engines as one, on which control requests act. Knobs and files are those of the engine whose processes
    join; the kernel has its own files."""

    def __init__(self, agents: Agents, others: Sequence[Engine] = ()) -> None:
        self._agents = agents
        self._all: list[Engine] = [agents, *others]

    def files(self) -> dict[str, str]:
        return self._agents.files()

    def knobs(self) -> dict[str, str]:
        return self._agents.knobs()

    def get(self, knob: str) -> str:
        return self._agents.get(knob)

    def set(self, knob: str, value: str, cancelled: Cancelled) -> None:
        self._agents.set(knob, value, cancelled)

    def pids(self) -> list[int]:
        return self._agents.pids()

    def introductions(self) -> contextlib.AbstractContextManager[Arrivals]:
        return self._agents.introductions()

    def merge(self, pid: int, vpn: int, npages: int, owner: str | None = None) -> Answer:
        return self._agents.merge(pid, vpn, npages, owner)

    def counters(self, owner: str | None = None) -> dict[str, Any]:
        return self._agents.counters(owner)

    def by_engine(self, owner: str | None = None) -> dict[str, dict[str, Any]]:
        """The counters of each, by its name."""
        return {engine.name: engine.counters(owner) for engine in self._all}

    def rows(self) -> list[Answer]:
        return self._once(engine.rows() for engine in self._all)

    def commitments(self) -> tuple[list[Answer], list[Answer]]:
        """And a row for each cgroup: the bytes needed if all merged pages in it were written at once, and those
        available."""
        rows = self._once(engine.commitments() for engine in self._all)
        return rows, _cgroups(rows)

    def _once(self, found: Iterable[list[Answer]]) -> list[Answer]:
        """One row for each process. An engine that looks only now and then may still have one that has joined since."""
        rows: dict[int, Answer] = {}
        for engine, theirs in zip(self._all, found, strict=True):
            for row in theirs:
                rows.setdefault(row["pid"], _named(engine, row))
        return list(rows.values())

    def row(self, pid: int) -> Answer | None:
        return next((row for engine in self._all if (row := engine.row(pid)) is not None), None)

    def unmerge(self, pids: list[int], progress: Progress, cancelled: Cancelled) -> Answer:
        """Unmerge with one engine after the other: each looks for memory by itself."""
        total: Answer = {"errno": None, "pages_unmerged": 0, "pages_remaining": 0, "bytes_needed": 0, "failed": []}
        summed = ("pages_unmerged", "pages_remaining", "bytes_needed", "failed")
        for engine, theirs in self._shares(pids):
            done = engine.unmerge(theirs, progress, cancelled)
            sums = {name: total[name] + done[name] for name in summed}
            total = (done if total["errno"] is None else total) | sums  # what the first that failed says
        return total | {"ok": total["errno"] is None}

    def _shares(self, pids: list[int]) -> list[tuple[Engine, list[int]]]:
        """Which engine unmerges which processes."""
        if len(self._all) == 1 or not pids:
            return [(engine, pids) for engine in self._all]
        shares: dict[str, list[int]] = {}
        for pid in pids:
            engine = next((engine for engine in self._all if engine.row(pid) is not None), None)
            if engine is None:
                raise ProcessLookupError(errno.ESRCH, f"process {pid} is served by no engine")
            shares.setdefault(engine.name, []).append(pid)
        return [(engine, shares[engine.name]) for engine in self._all if engine.name in shares]


def _named(engine: Engine, row: Answer) -> Answer:
    return {"pid": row["pid"], "comm": row["comm"], "engine": engine.name} | row


def _cgroups(rows: Iterable[Answer]) -> list[Answer]:
    groups: dict[str, Answer] = {}
    for row in rows:
        group, available = row["cgroup"], row["bytes_available"]
        sums = groups.setdefault(
            group, {"cgroup": group, "processes": 0, "bytes_needed": 0, "bytes_available": available}
        )
        sums["processes"] += 1
        sums["bytes_needed"] += row["bytes_needed"]
        sums["bytes_available"] = min(sums["bytes_available"], available)
    return list(groups.values())
