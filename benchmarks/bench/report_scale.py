"""What the records of growth, crowds and changing memory mean."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace

from benchmarks.bench.measures import MIB, Record
from benchmarks.bench.rows import DEFAULTS, KERNEL, SAMEPAGE, UNSKIPPING, Row, by_side, row, without_ratio

GROWTH = "CPU for merging a page, as it grows"
AREAS = "two processes with the same pages, each an area of its own"
FORKS = "CPU for each page that a forked worker shares"
COMINGS = "CPU for each of 2,000 processes a minute, with the same MiB"
MIXED = "two processes, a tenth equal, the rest changing"

FLAT = 1.5
"""The dearest may cost so many times the cheapest."""


def growth(records: list[Record]) -> list[Row]:
    """What a page costs at each size; and how much dearer the dearest is than the cheapest, where only the number of
    processes grows, or only their memory."""
    found = []
    many, large = (
        _sizes(records, lambda r: r["mib"] == records[0]["mib"]),
        _sizes(records, lambda r: r["processes"] == 2),
    )
    for name, sizes in (("processes", many), ("memory", large)):
        costs = {}
        for count, mib in sizes:
            of = [record for record in records if (record["processes"], record["mib"]) == (count, mib)]
            costs[f"{count} processes of {mib} MiB"] = by_side(of, cpu_us)
        found += [row(GROWTH, size, "µs", cost) for size, cost in costs.items()]
        found.append(_dearest(GROWTH, f", {name}", costs))
    return found


def mixed(records: list[Record]) -> list[Row]:
    """The last row: what was saved by the time that as much was spent as samepage spent in all."""
    spent = by_side(records, lambda r: r["cpu_seconds"][-1])
    saved = by_side(records, lambda r: r["saved"][-1] / MIB)

    def for_the_same(record: Record) -> float | None:
        cpu = spent.get(SAMEPAGE, {}).get(record["repeat"], -1.0)
        by_then = [saved for saved, so_far in zip(record["saved"], record["cpu_seconds"], strict=True) if so_far <= cpu]
        return float(max(by_then)) / MIB if by_then else None

    window = f"{records[0]['seconds'][-1]:.0f} s"
    found = [without_ratio(row(MIXED, f"memory saved after {window}", "MiB", saved))]
    found.append(row(MIXED, f"CPU in these {window}", "s", spent))
    each = by_side(records, lambda r: r["cpu_seconds"][-1] * MIB / s if (s := r["saved"][-1]) > MIB else None)
    for other, setting in ((UNSKIPPING, "smart_scan 0"), (KERNEL, "smart_scan 1")):
        pair = {side: of for side, of in each.items() if side in (SAMEPAGE, DEFAULTS, other)}
        if other in pair:
            name = f"CPU for each MiB saved, {setting} for ksmd"
            found.append(row(MIXED, name, "s", pair, at_least=5.0, other=other))
    one = row(MIXED, "memory saved for the CPU that samepage takes", "MiB", by_side(records, for_the_same))
    ours, theirs = one.values.get(SAMEPAGE), one.values.get(KERNEL)
    reached = None if ours is None or theirs is None else float(ours) >= 5 * float(theirs)
    found.append(replace(one, ratio=None, target="5 times more", reached=reached))
    return found


def _sizes(records: list[Record], which: Callable[[Record], bool]) -> list[tuple[int, int]]:
    return list(dict.fromkeys((r["processes"], r["mib"]) for r in records if which(r)))


def cpu_us(record: Record) -> float:
    return float(record["cpu_us"])


def areas(records: list[Record]) -> list[Row]:
    """What a page costs at each size."""
    of = {size: [r for r in records if r["size"] == size] for size in dict.fromkeys(r["size"] for r in records)}
    found = [row(AREAS, f"{size:,} areas each: time", "s", by_side(of[size], lambda r: r["seconds"])) for size in of]
    costs = {f"{size:,} areas each: CPU a page": by_side(of[size], cpu_us) for size in of}
    return [*found, *(row(AREAS, name, "µs", cost) for name, cost in costs.items()), _dearest(AREAS, "", costs)]


def forks(records: list[Record]) -> list[Row]:
    """Of the first workers, of the last, and of those between."""
    costs = {}
    for which in dict.fromkeys(r["which"] for r in records):
        of = [r for r in records if r["which"] == which]
        costs[f"the {which} {of[0]['children']}, {of[0]['extents']:,} pages each"] = by_side(of, cpu_us)
    return [*(row(FORKS, name, "µs", cost) for name, cost in costs.items()), _dearest(FORKS, "", costs)]


def comings(records: list[Record]) -> list[Row]:
    """The process's own, beside what it takes without any merging, and its share of what is spent on merging."""
    costs = {}
    for size in dict.fromkeys(r["size"] for r in records):
        costs[f"beside {size} that stay"] = by_side([r for r in records if r["size"] == size], lambda r: r["cpu_ms"])
    return [*(row(COMINGS, name, "ms", cost) for name, cost in costs.items()), _dearest(COMINGS, "", costs)]


def _dearest(group: str, what: str, costs: dict[str, dict[str, dict[int, float]]]) -> Row:
    """How many times dearer the dearest is than the cheapest, of what each cost, by side and repeat."""
    dearer: dict[str, dict[int, float]] = {}
    for side in {side for numbers in costs.values() for side in numbers}:
        medians = [statistics.median(numbers[side].values()) for numbers in costs.values() if side in numbers]
        if min(medians) > 0:
            dearer[side] = {0: max(medians) / min(medians)}
    return row(group, f"dearest by cheapest{what}", "times", dearer, at_most=FLAT)
