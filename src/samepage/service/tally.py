"""What a service counts for its metrics, by merge domain and cgroup: CPU time, stalls, unmerges, processes that
were dropped.

A pair of domain and cgroup is a *place*. Users can make any number of cgroups and user namespaces, and each place is a
time series in somebody's database. So there are at most `PLACES_MAX` of them; all others together are one, `OTHERS`.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from samepage.ksmd import ProcessRow
from samepage.memory import NO_STALLS, Stalls
from samepage.memory.agent import memory_cgroup
from samepage.process.merge_domain import MergeDomain

PLACES_MAX = 100

PLACES_OF_A_GUEST = 10
"""The most places of a user who does not own the service."""

IDLE = 600.0
"""Seconds after which a place without a process makes room for another."""

CGROUP_EVERY = 30.0
"""Seconds between two looks at the cgroup of a process."""

SETTLED = 1.0
"""After so many seconds a row is about the process that joined, not about the program that it was before an exec."""

NAME_MAX = 200
"""How many characters of a cgroup's path are shown; of a longer path, the last ones."""

OTHERS = ("others", "others")

OUTCOMES = ("done", "ENOMEM", "EINTR", "EFAULT", "ETIMEDOUT")
"""The outcomes of an unmerge. All exist from the start, with 0, and so do the reasons below: if a series began with 1,
Prometheus would not see that it grew."""

KINDS = {
    "it changed its": "another user",
    "it entered another user namespace": "another user",
    "it belongs in merge domain": "another domain",
    "it is to be left alone": "another domain",
    "it executed another program": "another program",
    "its pid is another": "another program",
    "no answer in time": "no answer",
    "it keeps everybody waiting": "too slow",
    "it tells of more pages": "false claims",
    "": "protocol",
}
"""Words for why a process was dropped, by the beginning of the full reason."""

REFUSALS = ("no user id", "too many connections", "no descriptors", "not allowed", "protocol")
"""Why a process may not join."""


def _zeros(names: Iterable[str]) -> Counter[str]:
    return Counter(dict.fromkeys(names, 0))


@dataclass(slots=True, eq=False)
class Place:
    """The processes of one domain in one cgroup. These counts only grow."""

    domain: str
    cgroup: str
    user: int | None = None
    used: float = 0.0
    """When it last had a process, in `time.monotonic`."""
    cpu_seconds: float = 0.0
    """CPU time of the agents."""
    stalls: Stalls = NO_STALLS
    unmerges: Counter[str] = field(default_factory=lambda: _zeros(OUTCOMES))
    """By outcome."""
    dropped: Counter[str] = field(default_factory=lambda: _zeros(KINDS.values()))
    """Processes that are not served any more though they did not end, by reason."""


@dataclass(slots=True)
class _Process:
    place: Place
    entered: float
    looked: float
    cpu_seconds: float = 0.0
    stalls: Stalls = NO_STALLS


class Tally:
    """Counts for metrics. Any thread may call any method, and none waits for ksmd or for a process. `owner` runs the
    service."""

    def __init__(
        self,
        owner: int,
        clock: Callable[[], float] = time.monotonic,
        cgroup_of: Callable[[int], str] = memory_cgroup,
    ) -> None:
        self._owner = owner
        self._clock = clock
        self._cgroup_of = cgroup_of
        self._lock = threading.Lock()
        self._places: dict[tuple[MergeDomain, str], Place] = {}
        self._others = Place(*OTHERS)
        self._processes: dict[int, _Process] = {}
        self._refused = _zeros(REFUSALS)

    def enter(self, pid: int, domain: MergeDomain) -> None:
        """A process joined."""
        with self._lock:
            now = self._clock()
            self._processes[pid] = _Process(self._place(pid, domain), now, now)

    def look(self, rows: Iterable[ProcessRow]) -> list[Place]:
        """Take in the CPU time and the stalls of processes, and whether they are in another cgroup. Returns the place
        of each, in order."""
        with self._lock:
            return [self._look(row) for row in rows]

    def leave(self, pid: int, cpu_seconds: float, stalls: Stalls, why: str | None) -> None:
        """A process left; `why`, if it did not end."""
        with self._lock:
            process = self._processes.pop(pid, None)
            if process is not None:
                _spend(process, cpu_seconds, stalls)
                if why is not None:
                    process.place.dropped[kind_of(why)] += 1

    def unmerged(self, pid: int, domain: MergeDomain, outcome: str) -> None:
        """Somebody asked for an unmerge of a process."""
        with self._lock:
            process = self._processes.get(pid)
            place = process.place if process else self._place(pid, domain)
            place.unmerges[outcome] += 1

    def refuse(self, why: str) -> None:
        """A process may not join. `why` is one of `REFUSALS`."""
        with self._lock:
            self._refused[why] += 1

    def refused(self) -> dict[str, int]:
        with self._lock:
            return dict(self._refused)

    def places(self) -> list[Place]:
        """All of them, `OTHERS` if anybody was counted there."""
        with self._lock:
            others = [self._others] if self._others.used else []
            return [*self._places.values(), *others]

    def _look(self, row: ProcessRow) -> Place:
        process, now = self._processes.get(row.pid), self._clock()
        if process is None:  # it has just left
            return self._place(row.pid, row.domain)
        if now - process.looked >= CGROUP_EVERY:
            process.place, process.looked = self._place(row.pid, row.domain, process.place), now
        process.place.used = now
        if now - process.entered >= SETTLED:
            _spend(process, row.cpu_seconds, row.stalls)
        return process.place

    def _place(self, pid: int, domain: MergeDomain, before: Place | None = None) -> Place:
        cgroup = self._cgroup_of(pid)
        if before is not None and not cgroup:  # it has just ended
            return before
        cgroup = cgroup if len(cgroup) <= NAME_MAX else "..." + cgroup[-NAME_MAX:]
        place = self._places.get((domain, cgroup))
        if place is None:
            if not self._has_room(domain.user):
                place = self._others
            else:
                place = self._places[domain, cgroup] = Place(str(domain), cgroup, domain.user)
        place.used = self._clock()
        return place

    def _has_room(self, user: int) -> bool:
        if self._may_have_one_more(user):
            return True
        before, busy = self._clock() - IDLE, {process.place for process in self._processes.values()}
        for key, place in list(self._places.items()):
            if place.used < before and place not in busy:
                del self._places[key]
        return self._may_have_one_more(user)

    def _may_have_one_more(self, user: int) -> bool:
        had = sum(place.user == user for place in self._places.values())
        return len(self._places) < PLACES_MAX and (user == self._owner or had < PLACES_OF_A_GUEST)


def _spend(process: _Process, cpu_seconds: float, stalls: Stalls) -> None:
    process.place.cpu_seconds += max(0.0, cpu_seconds - process.cpu_seconds)
    process.cpu_seconds = max(process.cpu_seconds, cpu_seconds)
    if stalls.ns > process.stalls.ns:
        process.place.stalls += stalls - process.stalls
        process.stalls = stalls


def kind_of(why: str) -> str:
    """A word for why a process was dropped."""
    return next(kind for begin, kind in KINDS.items() if why.startswith(begin))
