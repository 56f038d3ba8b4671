"""Where to put the workloads of a fleet, compared with other placements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from samepage.fleet import FleetError
from samepage.fleet.placement import Problem, exact, first_fit, greedy, random
from samepage.fleet.queries import Answers, Fleet
from samepage.memory import PAGE_SIZE

SETS_PAGES = 1 << 20
"""Contents of workloads that are looked at, at most: the shares of a sample of those are as good."""

SEEDS = range(5)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a placement saves (sampled pages, between workloads), and how many workloads move for it."""

    name: str
    saved: int
    moves: int


@dataclass(frozen=True, slots=True)
class Move:
    """A workload that moves to another host."""

    host: str
    service: str
    to: str


@dataclass(frozen=True, slots=True)
class Advice:
    """The plans, the best last, and the moves for that one. No placement saves more than `bound`."""

    plans: list[Plan]
    bound: int
    moves: list[Move]


def problem_of(fleet: Fleet, answers: Answers, host_memory: int | None) -> Problem:
    """The workloads and hosts of the recordings. Sizes are of sampled pages."""
    hosts = sorted({workload.host for workload in answers.workloads})
    number = {host: i for i, host in enumerate(hosts)}
    room = fleet.host_bytes()
    every = 1
    while answers.contents // every > SETS_PAGES:
        every *= 2
    return Problem(
        sizes=[workload.pages for workload in answers.workloads],
        sets=fleet.shared_sets(every),
        hosts=[int((host_memory or room[host]) / PAGE_SIZE * answers.fraction) for host in hosts],
        now=[number[workload.host] for workload in answers.workloads],
    )


def advise(fleet: Fleet, answers: Answers, host_memory: int | None) -> Advice:
    """Compare placements. Raises FleetError if there is not room for all workloads."""
    problem = problem_of(fleet, answers, host_memory)
    plans = [Plan("as it is", problem.saved(problem.now), 0)]

    def add(name: str, make: Callable[[], list[int]]) -> None:
        try:
            host_of = make()
        except FleetError:  # it may not find room although others do
            return
        plans.append(Plan(name, problem.saved(host_of), problem.moves(host_of)))

    for seed in SEEDS:
        add("random", lambda seed=seed: random(problem, seed))  # type: ignore[misc]
    randoms = plans[1:]
    if randoms:
        saved, moved = sum(p.saved for p in randoms), sum(p.moves for p in randoms)
        times = len(randoms)
        plans[1:] = [Plan(f"random ({times} times, on average)", saved // times, moved // times)]
    add("first-fit", lambda: first_fit(problem))
    best = exact(problem)
    name = "samepage (exact)" if best is not None else "samepage (greedy)"
    best = greedy(problem) if best is None else best
    plans.append(Plan(name, problem.saved(best), problem.moves(best)))
    hosts = sorted({workload.host for workload in answers.workloads})
    moves = [
        Move(workload.host, workload.service, hosts[to])
        for workload, to, now in zip(answers.workloads, best, problem.now, strict=True)
        if to != now
    ]
    return Advice(plans, problem.bound, moves)
