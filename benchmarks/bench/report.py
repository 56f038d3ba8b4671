"""What the records mean: medians, ratios, and what of it the project promises (TARGETS)."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from rich.table import Table
from rich.text import Text

from benchmarks.bench import report_scale
from benchmarks.bench.measures import MIB, NEARLY_ALL, Record
from benchmarks.bench.rows import (
    COLUMNS,
    DEFAULTS,
    FLOOR,
    KERNEL,
    PACED,
    SAMEPAGE,
    UNSKIPPING,
    Row,
    by_side,
    row,
    without_ratio,
)

PASSES = "CPU of a pass over memory that was seen before"
NOTHING = "two processes with nothing in common"
THROUGHPUT = "an application in one of two processes with the same pages"
STALLS = "a write to a page while pages are merged"
SERVERS = "answers of a server whose memory is merged with a second one's"
HOLES = "pages away from their place, seen from outside"
BY_THE_KERNEL = "two processes, the same pages, merged by the kernel"
GUESTS = "a guest of KVM while it is merged with another"
TITLES = {
    "same": "two processes, the same pages",
    "eight": "eight processes, the same pages",
    "model": "workers of one model",
    "scattered": "the same pages, each elsewhere",
    "runs": "the same, in runs of 16 pages",
}
SOONER = {"same": 6.0, "eight": 8.0, "scattered": 1.0}
"""How many times sooner than the kernel samepage is to merge,"""
CHEAPER = {"same": 4.0, "scattered": 1.0}
"""and how many times less CPU it may take."""


def rows(records: list[Record]) -> list[Row]:
    """The whole table."""
    found: list[Row] = []
    for name in TITLES:
        if of := [record for record in records if record["experiment"] == name]:
            found += _merging(name, of)
    for name, build in (
        ("unchanged", _passes),
        ("growth", report_scale.growth),
        ("areas", report_scale.areas),
        ("forks", report_scale.forks),
        ("comings", report_scale.comings),
        ("mixed", report_scale.mixed),
        ("nothing", _nothing),
        ("throughput", _throughput),
        ("stall", _stalls),
        ("neighbour", _servers),
        ("holes", _holes),
        ("guest", _guests),
        ("paced", _paced),
    ):
        if of := [record for record in records if record["experiment"] == name]:
            found += build(of)
    return found


# ---- merging ---------------------------------------------------------------------------------------------------------


def levels(records: list[Record]) -> dict[int, float]:
    """By repeat, the bytes that both sides are timed to: 95 % of what can be saved, or where one of them ends up with
    less (for want of mappings, say, or because it takes large allocations only), 95 % of that."""
    found: dict[int, float] = {}
    for record in records:
        if record.get("finished"):
            goal, final = NEARLY_ALL * record["goal"], max(record["curve"]["saved"])
            level = goal if final >= goal else NEARLY_ALL * final
            found[record["repeat"]] = min(level, found.get(record["repeat"], level))
    return found


def at_level(record: Record, level: float | None, what: str) -> float | None:
    """The curve's `what` when so many bytes were saved; None if they never were."""
    curve = record.get("curve")
    if curve is None or level is None:
        return None
    there = np.flatnonzero(np.array(curve["saved"]) >= level)
    return float(curve[what][there[0]]) if len(there) else None


def _merging(name: str, records: list[Record]) -> list[Row]:
    title = TITLES[name]
    level = levels(records)

    def when(what: str) -> Callable[[Record], float | None]:
        by_hand = {"seconds": "seconds", "cpu_seconds": "cpu_seconds"}[what]
        return lambda r: at_level(r, level.get(r["repeat"]), what) if "curve" in r else r[by_hand]

    share = min((bytes_ / max(r["goal"] for r in records if "goal" in r) for bytes_ in level.values()), default=0.0)
    until = f"until {share:.0%} of what can be saved is"
    time = row(title, f"time {until}", "s", by_side(records, when("seconds")), at_least=SOONER.get(name))
    cpu = row(title, f"CPU {until}", "s", by_side(records, when("cpu_seconds")), at_least=CHEAPER.get(name))
    for record in records:
        if record.get("finished") is False:
            saved, seconds = max(record["curve"]["saved"]), record["curve"]["seconds"][-1]
            time.values.setdefault(record["side"], f"not finished: {saved / record['goal']:.0%} after {seconds:.0f} s")
            cpu.values.setdefault(record["side"], f"{record['curve']['cpu_seconds'][-1]:.2f} by then")
    found = [time, cpu]
    if any(record["side"] == FLOOR for record in records):
        for what, words in (("seconds", "time"), ("cpu_seconds", "CPU")):
            found.append(_of_the_floor(title, words, by_side(records, when(what))))
    goal = max(r["goal"] for r in records if "goal" in r)
    numbers = by_side(records, lambda r: r["saved_pss"] / MIB if "saved_pss" in r else None)
    found.append(row(title, f"memory saved (PSS), of {goal / MIB:.0f} MiB", "MiB", numbers))
    found[-1] = without_ratio(found[-1])
    taken = by_side(records, lambda r: -min(r["curve"]["saved"]) / MIB if r.get("finished") else None)
    found.append(without_ratio(row(title, "memory taken for it meanwhile, at most", "MiB", taken)))
    if name in ("same", "scattered"):
        bytes_a_page = by_side(
            records, lambda r: r["metadata"]["bytes"] / r["metadata"]["pages"] if r.get("finished") else None
        )
        found.append(row(title, "metadata a page", "bytes", bytes_a_page, at_most=16))
    if name == "same":
        merged = by_side(records, lambda r: 1000 * statistics.mean(p) if (p := r.get("merged_passes")) else None)
        found.append(row(title, "CPU of a pass once they are merged", "ms", merged))
        unmerge = by_side(records, lambda r: r["unmerge_seconds"] if r.get("finished") else None)
        found.append(row(title, f"time to unmerge {2 * goal / MIB:.0f} MiB", "s", unmerge))
    if name == "scattered":
        left = by_side(records, lambda r: r["counters"].get("pages_unmerged_vma"))
        found.append(row(title, "left unmerged for want of mappings", "pages", left))
        added = by_side(records, lambda r: float(r["mappings_added"]))
        found.append(without_ratio(row(title, "mappings more than before", "", added)))
    return found


def _of_the_floor(title: str, words: str, numbers: dict[str, dict[int, float]]) -> Row:
    """How many times as much as the system calls alone take for all of it."""
    floor = numbers.pop(FLOOR)
    times = {side: {n: of[n] / floor[n] for n in of if n in floor} for side, of in numbers.items()}
    return without_ratio(
        row(title, f"{words}, of the floor's", "×", {k: v for k, v in times.items() if v}, at_most=1.3)
    )


# ---- passes ----------------------------------------------------------------------------------------------------------


def _passes(records: list[Record]) -> list[Row]:
    found = []

    def cost(key: str) -> Callable[[Record], float | None]:
        # Where passes differ in turn (smart_scan on either side), the mean of a whole cycle; else the median.
        def read(record: Record) -> float | None:
            if key not in record:
                return None
            in_turn = key == "passes" or record["side"] == KERNEL
            average = statistics.mean if in_turn else statistics.median
            return 1000 * float(average(record[key]))

        return read

    for mib in sorted({record["mib"] for record in records}):
        of = [record for record in records if record["mib"] == mib]
        for key, what in (("passes", "unchanged"), ("rewritten_passes", "1 % rewritten")):
            numbers = by_side(of, cost(key))
            for other, setting in ((UNSKIPPING, "smart_scan 0"), (KERNEL, "smart_scan 1")):
                if other not in numbers:
                    continue
                pair = {side: numbers[side] for side in (SAMEPAGE, other) if side in numbers}
                name = f"{mib / 1024:g} GiB, {what}, {setting} for ksmd"
                found.append(row(PASSES, name, "ms", pair, at_least=200 if key == "passes" else None, other=other))
            if numbers and not {UNSKIPPING, KERNEL} & set(numbers):
                found.append(row(PASSES, f"{mib / 1024:g} GiB, {what}", "ms", numbers))
    return found


# ---- the application -------------------------------------------------------------------------------------------------


def _percent(now: float | None, otherwise: Sequence[float | None]) -> float | None:
    """What is left of a rate, of the median of what it is otherwise; None where nothing was seen."""
    seen = [rate for rate in otherwise if rate]
    return 100 * now / statistics.median(seen) if now and len(seen) == len(otherwise) else None


def _at_least(one: Row, percent: float) -> Row:
    ours = one.values.get(SAMEPAGE)
    reached = None if ours is None else float(ours) >= percent
    return replace(one, ratio=None, target=f"at least {percent:g} %", reached=reached)


WORK = (("reductions", "sums"), ("writes", "random writes"))


def _nothing(records: list[Record]) -> list[Row]:
    share = by_side(records, lambda r: 100 * r["cpu_share"])
    found = [row(NOTHING, "CPU after the first pass, of a core", "%", share, at_most=2)]
    for what, title in WORK:
        numbers = by_side(records, lambda r: _percent(r["on"][what], [r["before"][what], r["after"][what]]))  # noqa: B023
        found.append(_at_least(row(NOTHING, f"application, {title}, of what it is without", "%", numbers), 97))
    return found


def _throughput(records: list[Record]) -> list[Row]:
    found = []
    for when, read in (("while pages are merged", _meanwhile), ("afterwards", _afterwards)):
        for what, title in WORK:
            numbers = by_side(records, functools.partial(read, what))
            found.append(without_ratio(row(THROUGHPUT, f"{title} {when}, of before", "%", numbers)))
    return found


def _meanwhile(what: str, record: Record) -> float | None:
    return _percent(record["merging"][what], [look["worker"][what] for look in record["before"]])


def _afterwards(what: str, record: Record) -> float | None:
    """By what the yardstick did in the same turn, afterwards as before."""

    def shares(looks: list[Record]) -> list[float | None]:
        return [_percent(look["worker"][what], [look["yardstick"][what]]) for look in looks]

    after = [share for share in shares(record["after"]) if share]
    whole = len(after) == len(record["after"])
    return _percent(statistics.median(after), shares(record["before"])) if whole else None


# ---- stalls ----------------------------------------------------------------------------------------------------------


def percentile_us(histogram: list[list[int]], share: float) -> float:
    """Of whole microseconds and how often each was seen: the upper end of the one that this share of all is within."""
    took, counts = np.array(histogram[0]), np.cumsum(histogram[1])
    return float(took[np.searchsorted(counts, share * counts[-1])]) + 1


def _stalls(records: list[Record]) -> list[Row]:
    tail = by_side(records, lambda r: percentile_us(r["histogram_us"], 0.999))
    longest = by_side(records, lambda r: r["longest_us"])
    return [
        row(STALLS, "99.9th percentile", "µs", tail, at_most=200),
        row(STALLS, "longest", "µs", longest, at_most=1000),
    ]


# ---- servers ---------------------------------------------------------------------------------------------------------


def _servers(records: list[Record]) -> list[Row]:
    """How long answers take before anything is merged, and how many times as long afterwards."""
    found = []
    for kind, free in sorted({(record["kind"], record["free_core"]) for record in records}, reverse=True):
        of = [record for record in records if (record["kind"], record["free_core"]) == (kind, free)]
        where = f"{kind}, {'a free core' if free else 'no free core'}"
        for name, share in (("median", 0.5), ("99th percentile", 0.99), ("99.9th percentile", 0.999)):
            numbers = by_side(of, functools.partial(_answered, share=share))
            found.append(without_ratio(row(SERVERS, f"{where}: {name} before", "µs", numbers)))
            for when, words in (("merging", "while merging"), ("merged", "merged")):
                numbers = by_side(of, functools.partial(_times_slower, share=share, when=when))
                limit = (1.1 if free else 1.3) if share == 0.99 else None
                found.append(
                    without_ratio(row(SERVERS, f"{where}: {name} {words}, of before", "×", numbers, None, limit))
                )
        saved = by_side(of, lambda r: r["saved"] / MIB if r["side"] != "alone" else None)
        found.append(without_ratio(row(SERVERS, f"{where}: saved once merged", "MiB", saved)))
        longest = by_side(of, lambda r: r["merging"]["longest_us"])
        found.append(without_ratio(row(SERVERS, f"{where}: longest while merging", "µs", longest)))
    return found


def _answered(record: Record, share: float, when: str = "before") -> float | None:
    histogram = record[when]["histogram_us"]
    return percentile_us(histogram, share) if histogram[0] else None


def _times_slower(record: Record, share: float, when: str) -> float | None:
    before, now = _answered(record, share), _answered(record, share, when)
    return now / before if now and before else None


# ---- holes, guests ---------------------------------------------------------------------------------------------------


def _holes(records: list[Record]) -> list[Row]:
    """Of looks at all pages of a process while it was merged and unmerged, how many found a page away; of these, how
    many pages at once; and how long a block of 2 MiB had one that was away."""

    def away(record: Record, share: float) -> float | None:
        counts = [(n, times) for n, times in zip(*record["away_at_once"], strict=True) if n]
        return percentile_us([list(column) for column in zip(*counts, strict=True)], share) - 1 if counts else None

    def lasted(record: Record, share: float) -> float | None:
        return percentile_us(record["lasted_us"], share) if record["lasted_us"][0] else None

    def share(record: Record) -> float:
        none = sum(times for n, times in zip(*record["away_at_once"], strict=True) if n == 0)
        return 100.0 - 100.0 * float(none) / float(record["looks"])

    made = [row(HOLES, "looks that find a page away", "%", by_side(records, share))]
    for name, unit, read in (("pages away at once", "", away), ("lasting", "µs", lasted)):
        for word, part in (("median", 0.5), ("99th percentile", 0.99), ("most", 1.0)):
            if found := by_side(records, functools.partial(read, share=part)):
                made.append(row(HOLES, f"{name}, {word}", unit, found))
    return made


def _guests(records: list[Record]) -> list[Row]:
    return [
        row(GUESTS, "longest round over all of its memory", "ms", by_side(records, lambda r: r["longest_us"] / 1000)),
        row(GUESTS, "rounds a second", "", by_side(records, lambda r: r["rounds"])),
        row(GUESTS, "saved meanwhile", "MiB", by_side(records, lambda r: r["saved"] / MIB)),
    ]


# ---- the kernel's pace -----------------------------------------------------------------------------------------------


def _paced(records: list[Record]) -> list[Row]:
    """The ratio of the time is to ksmd's defaults, or to the time that they were given, where there are these; the
    others are to it at its fastest."""
    found = []
    for mib in dict.fromkeys(record["mib"] for record in records):
        of = [record for record in records if record["mib"] == mib]
        found += [_paced_time(f"{mib} MiB: time until 95% is saved", of)]
        cpu = by_side(of, lambda r: at_level(r, NEARLY_ALL * r["goal"], "cpu_seconds"))
        found.append(row(BY_THE_KERNEL, f"{mib} MiB: CPU until 95% is saved", "s", cpu, 1.0, one=PACED))
        after = by_side(of, lambda r: 100 * r["cpu_share_afterwards"])
        found.append(row(BY_THE_KERNEL, f"{mib} MiB: CPU afterwards, of a core", "%", after, one=PACED))
    return found


def _paced_time(name: str, records: list[Record]) -> Row:
    times = by_side(records, lambda r: at_level(r, NEARLY_ALL * r["goal"], "seconds"))
    time = row(BY_THE_KERNEL, name, "s", times, one=PACED)
    given = {r["side"]: r["curve"]["seconds"][-1] for r in records if r["repeat"] == 0}
    ours = list(times.get(PACED, {}).values())
    if DEFAULTS in given and ours:
        ratio = times.get(DEFAULTS, {}).get(0, given[DEFAULTS]) / statistics.median(ours)
        time = replace(time, ratio=ratio, target="10 times less", reached=ratio >= 10)
    for side, seconds in given.items():
        time.values.setdefault(side, f"not within {seconds:.0f} s")
    return time


# ---- the table -------------------------------------------------------------------------------------------------------


def shown(value: float | str | None) -> str:
    """Three digits, more where the number is whole."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def table(all_rows: list[Row]) -> Table:
    """For people. Columns that nobody has anything in are left out."""
    used, lines = _cells(all_rows)
    made = Table("", *used, "ksmd / samepage", "target", "reached", pad_edge=False)
    for column in made.columns[1 : len(used) + 2]:
        column.justify = "right"
    for group, cells in lines:
        if group:
            made.add_section()
            made.add_row(Text(group, style="bold"))
        made.add_row(*(Text(cell) for cell in cells))
    return made


def markdown(all_rows: list[Row]) -> str:
    """The same for docs/benchmarks.md."""
    used, lines = _cells(all_rows)
    text = [["", *used, "ksmd / samepage", "target", "reached"], ["---"] * (len(used) + 4)]
    for group, cells in lines:
        if group:
            text.append([f"**{group}**", *[""] * (len(used) + 3)])
        text.append(cells)
    return "".join(f"| {' | '.join(line)} |\n" for line in text)


def _cells(all_rows: list[Row]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The columns in use, and every row's cells with the name of the group that it begins."""
    used = [column for column in COLUMNS if any(column in one.values for one in all_rows)]
    lines, group = [], ""
    for one in all_rows:
        numbers = [shown(one.values.get(column)) for column in used]
        reached = {None: "", True: "yes", False: "no"}[one.reached]
        name = f"{one.name} ({one.unit})" if one.unit else one.name
        lines.append((one.group if one.group != group else "", [name, *numbers, shown(one.ratio), one.target, reached]))
        group = one.group
    return used, lines
