"""One line of the table, and the numbers it is made of."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from benchmarks.bench.measures import Record

FLOOR = "floor"
SAMEPAGE, KERNEL, DEFAULTS = "samepage", "ksmd fastest", "ksmd defaults"
LARGE = "samepage, large folios"
UNSKIPPING = "ksmd fastest, smart_scan 0"
PACED, TUNED, ADVISOR = "kernel, by samepage", "ksmtuned's", "kernel's advisor"
COLUMNS = (SAMEPAGE, LARGE, PACED, KERNEL, TUNED, ADVISOR, DEFAULTS, "shared_memory", "mapped file", FLOOR, "alone")


@dataclass(frozen=True)
class Row:
    """One line of the table. `values` are by column: medians, or words where there is no number."""

    group: str
    name: str
    unit: str
    values: dict[str, float | str]
    ratio: float | None = None
    """The kernel's (at its fastest) by samepage's, the median of the repeats': how many times less it is."""
    target: str = ""
    reached: bool | None = None
    spread: dict[str, list[float]] = field(default_factory=dict)
    """Least and most, where there is more than one."""


def by_side(records: Iterable[Record], read: Callable[[Record], float | None]) -> dict[str, dict[int, float]]:
    """A number from every record that has it, by side and repeat."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        value = read(record)
        if value is not None:
            found.setdefault(record["side"], {})[record["repeat"]] = value
    return found


def row(
    group: str,
    name: str,
    unit: str,
    numbers: dict[str, dict[int, float]],
    at_least: float | None = None,
    at_most: float | None = None,
    other: str = KERNEL,
    one: str = SAMEPAGE,
) -> Row:
    """A row of what each repeat gave. A target is of the ratio (`at_least`) or of samepage's own value (`at_most`);
    `other` is who the ratio is to, and stands in the kernel's column; `one` is whose it is."""
    values: dict[str, float | str] = {side: statistics.median(of.values()) for side, of in numbers.items()}
    ours, theirs = numbers.get(one, {}), numbers.get(other, {})
    pairs = [theirs[repeat] / ours[repeat] for repeat in ours if repeat in theirs and ours[repeat] > 0]
    ratio = statistics.median(pairs) if pairs else None
    target, reached = "", None
    if at_least is not None:
        target, reached = f"{at_least:g} times less", None if ratio is None else ratio >= at_least
    if at_most is not None and SAMEPAGE in values:
        target, reached = f"at most {at_most:g} {unit}", float(values[SAMEPAGE]) <= at_most
    if other != KERNEL:
        values[KERNEL] = values.pop(other, "")
    spread = {side: [min(of.values()), max(of.values())] for side, of in numbers.items() if len(of) > 1}
    return Row(group, name, unit, values, ratio, target, reached, spread)


def without_ratio(one: Row) -> Row:
    """Where a ratio would say nothing."""
    return replace(one, ratio=None)
