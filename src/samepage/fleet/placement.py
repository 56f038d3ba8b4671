"""Which workloads to put on a host together.

Of some of a workload's contents other workloads have copies, and merging leaves one copy on each host. So what a
placement saves is a sum over sets: `weight` contents that the same workloads have save `weight` for each of these
workloads on a host but the first. A host must have room for all its workloads unmerged, so that unmerging can succeed.

`exact` is a mixed integer program, for HiGHS. `greedy` puts the largest workloads first, where they save most, and then
moves and swaps workloads as long as that saves more. No placement saves more than `bound`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial

import highspy
import numpy as np
import numpy.typing as npt

from samepage.arrays import Bools, Ints
from samepage.fleet import FleetError

EXACT_VARIABLES = 300
"""With more variables than this, `greedy` decides."""

EXACT_SECONDS = 20.0

SMALL, RESTARTS = 400, 8
"""With at most SMALL workloads, pairs are swapped, too, and RESTARTS more orders are tried."""

SWEEPS = 8
"""How often all workloads are tried on other hosts, at most."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """`sizes` of the workloads, in pages; `sets` of workloads, each with the number of contents that they have in
    common; `hosts`, the pages that each has room for; where each workload is `now` (-1: nowhere)."""

    sizes: list[int]
    sets: list[tuple[tuple[int, ...], int]]
    hosts: list[int]
    now: list[int]

    @cached_property
    def weights(self) -> Floats:
        """The weights of the sets."""
        return np.array([weight for _, weight in self.sets], np.float64)

    @cached_property
    def sets_of(self) -> list[Ints]:
        """The sets that each workload is in."""
        out: list[list[int]] = [[] for _ in self.sizes]
        for number, (members, _) in enumerate(self.sets):
            for member in members:
                out[member].append(number)
        return [np.array(numbers, np.int64) for numbers in out]

    def saved(self, host_of: Iterable[int]) -> int:
        """How many pages merging within each host saves."""
        where = np.array(list(host_of))
        total = 0
        for members, weight in self.sets:
            hosts = where[list(members)]
            hosts = hosts[hosts >= 0]
            total += weight * (len(hosts) - len(np.unique(hosts)))
        return total

    def moves(self, host_of: list[int]) -> int:
        """How many workloads would move."""
        return sum(before >= 0 and before != after for before, after in zip(self.now, host_of, strict=True))

    @property
    def bound(self) -> int:
        """No placement saves more: each set keeps as many copies as its members need hosts."""
        largest = max(self.hosts)
        fewest = [-(-sum(self.sizes[m] for m in members) // largest) for members, _ in self.sets]
        return sum(weight * (len(members) - n) for (members, weight), n in zip(self.sets, fewest, strict=True))


def first_fit(problem: Problem) -> list[int]:
    """Put each workload, in its order, on the first host with room. Raises FleetError if there is not room for all."""
    return _fill(problem, range(len(problem.sizes)), lambda _, fits: int(np.flatnonzero(fits)[0]))


def random(problem: Problem, seed: int) -> list[int]:
    """Put each workload on a random host with room."""
    rng = np.random.default_rng(seed)
    order = np.argsort(problem.sizes)[::-1]  # or there may not be room for the last ones
    return _fill(problem, order.tolist(), lambda _, fits: int(rng.choice(np.flatnonzero(fits))))


def _fill(problem: Problem, order: Iterable[int], choose: Callable[[int, Bools], int]) -> list[int]:
    room = np.array(problem.hosts, np.int64)
    host_of = [-1] * len(problem.sizes)
    for workload in order:
        fits = room >= problem.sizes[workload]
        if not fits.any():
            raise FleetError("there is not room for all workloads on these hosts")
        host_of[workload] = choose(workload, fits)
        room[host_of[workload]] -= problem.sizes[workload]
    return host_of


def greedy(problem: Problem) -> list[int]:
    """The best of several placements: the current one, and new ones in several orders, each improved."""
    order = sorted(range(len(problem.sizes)), key=lambda w: -problem.sizes[w])
    rng = np.random.default_rng(0)
    orders = [order, *(rng.permutation(len(order)).tolist() for _ in range(RESTARTS if len(order) <= SMALL else 0))]
    begins = [partial(_as_is, problem), *(partial(_anew, problem, order) for order in orders)]
    candidates = []
    for begin in begins:
        try:
            state = _State(problem, begin())
        except FleetError:
            continue
        state.improve()
        candidates.append(_relabelled(problem, state.host_of.tolist()))
    if not candidates:
        raise FleetError("there is not room for all workloads on these hosts")
    return max(candidates, key=lambda host_of: (problem.saved(host_of), -problem.moves(host_of)))


def _as_is(problem: Problem) -> list[int]:
    """The current placement, if it fits."""
    used = np.zeros(len(problem.hosts), np.int64)
    for workload, host in enumerate(problem.now):
        if host >= 0:
            used[host] += problem.sizes[workload]
    if min(problem.now, default=0) < 0 or (used > np.array(problem.hosts)).any():
        raise FleetError("that is no placement")
    return list(problem.now)


def _anew(problem: Problem, order: list[int]) -> list[int]:
    """Put the workloads, in that order, where each saves most; of equal hosts on the fullest, or if it saves nothing on
    the emptiest."""
    counts = np.zeros((len(problem.hosts), len(problem.sets)), np.int32)
    room = np.array(problem.hosts, np.int64)

    def best(workload: int, fits: Bools) -> int:
        mine = problem.sets_of[workload]
        gain = (counts[:, mine] > 0) @ problem.weights[mine]
        gain = np.where(fits, gain, -1.0)
        at = np.flatnonzero(gain == gain.max())
        host = int(at[np.argmin(room[at])]) if gain.max() > 0 else int(at[np.argmax(room[at])])
        counts[host, mine] += 1
        room[host] -= problem.sizes[workload]
        return host

    return _fill(problem, order, best)


class _State:
    """A placement, and how many members of each set each host has."""

    def __init__(self, problem: Problem, host_of: list[int]) -> None:
        self._problem = problem
        self.host_of = np.array(host_of)
        self._counts = np.zeros((len(problem.hosts), len(problem.sets)), np.int32)
        self._room = np.array(problem.hosts, np.int64)
        for workload, host in enumerate(host_of):
            self._put(workload, host, 1)

    def _put(self, workload: int, host: int, by: int) -> None:
        self._counts[host, self._problem.sets_of[workload]] += by
        self._room[host] -= by * self._problem.sizes[workload]

    def _gains(self, workload: int) -> Floats:
        """What a workload would save on each host, if it was on none now."""
        mine = self._problem.sets_of[workload]
        gains: Floats = (self._counts[:, mine] > 0) @ self._problem.weights[mine]
        return gains

    def improve(self) -> None:
        """Move workloads, or swap two, as long as that saves more."""
        for _ in range(SWEEPS):
            better = False
            for workload in range(len(self.host_of)):
                better |= self._move(workload)
            if len(self.host_of) <= SMALL:
                better |= self._swap_all()
            if not better:
                return

    def _move(self, workload: int) -> bool:
        size, here = self._problem.sizes[workload], int(self.host_of[workload])
        self._put(workload, here, -1)
        gains = self._gains(workload)
        fits = self._room >= size
        to = int(np.argmax(np.where(fits, gains, -1.0)))
        if gains[to] <= gains[here]:
            to = here
        self._put(workload, to, 1)
        self.host_of[workload] = to
        return to != here

    def _swap_all(self) -> bool:
        better = False
        for one in range(len(self.host_of)):
            for other in range(one):
                better |= self._swap(one, other)
        return better

    def _swap(self, one: int, other: int) -> bool:
        here, there = int(self.host_of[one]), int(self.host_of[other])
        more = self._problem.sizes[one] - self._problem.sizes[other]
        if here == there or self._room[there] < more or self._room[here] < -more:
            return False
        self._put(one, here, -1)
        self._put(other, there, -1)
        before = self._gain(one, here) + self._gain(other, there)
        after = self._gain(one, there) + self._gain(other, here)
        better = after > before
        if better:
            here, there = there, here
        self._put(one, here, 1)
        self._put(other, there, 1)
        self.host_of[one], self.host_of[other] = here, there
        return better

    def _gain(self, workload: int, host: int) -> float:
        mine = self._problem.sets_of[workload]
        return float(self._problem.weights[mine][self._counts[host, mine] > 0].sum())


def _relabelled(problem: Problem, host_of: list[int]) -> list[int]:
    """The same groups, with hosts of the same size exchanged so that fewer workloads move."""
    out = list(host_of)
    for size in set(problem.hosts):
        alike = [host for host, room in enumerate(problem.hosts) if room == size]
        stay: dict[tuple[int, int], int] = {}
        for before, after in zip(problem.now, host_of, strict=True):
            if before in alike and after in alike:
                stay[after, before] = stay.get((after, before), 0) + 1
        to: dict[int, int] = {}
        for (group, host), _ in sorted(stay.items(), key=lambda item: (-item[1], item[0])):
            if group not in to and host not in to.values():
                to[group] = host
        free = [host for host in alike if host not in to.values()]
        for group in alike:
            if group not in to:
                to[group] = free.pop()
        for workload, host in enumerate(host_of):
            if host in to:
                out[workload] = to[host]
    return out


def exact(problem: Problem) -> list[int] | None:
    """The best placement. None: that would take too long to find."""
    workloads, hosts, sets = len(problem.sizes), len(problem.hosts), len(problem.sets)
    if (workloads + sets) * hosts > EXACT_VARIABLES:
        return None
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("time_limit", EXACT_SECONDS)
    solver.setOptionValue("mip_rel_gap", 0.0)
    here = [[solver.addBinary() for _ in range(hosts)] for _ in range(workloads)]
    # How many copies of a set's contents stay on a host: one, if any member is there.
    stays = [[solver.addVariable(lb=0, ub=1, obj=weight) for _ in range(hosts)] for _, weight in problem.sets]
    for row in here:
        solver.addConstr(sum(row[1:], row[0]) == 1)
    for host, room in enumerate(problem.hosts):
        terms = [size * here[w][host] for w, size in enumerate(problem.sizes)]
        solver.addConstr(sum(terms[1:], terms[0]) <= room)
        for (members, _), left in zip(problem.sets, stays, strict=True):
            for member in members:
                solver.addConstr(left[host] >= here[member][host])
    solver.minimize()
    if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        return None
    values = np.array([[solver.variableValue(x) for x in row] for row in here])
    return _relabelled(problem, [int(host) for host in values.argmax(1)])
