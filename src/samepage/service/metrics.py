"""What a service saves and what it costs, in Prometheus' format (docs/metrics.md has the list).

Names that begin with `node_ksmd_` are those of node_exporter's ksmd collector and mean the same, so that boards and
alerts made for KSM work. Everything is read from ksmd's last snapshot: no lock of ksmd's is taken, no process is asked.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from samepage.ksmd import ProcessRow
from samepage.ksmd.counters import DomainRow, Snapshot
from samepage.memory import PAGE_SIZE, STALLS_US, Stalls
from samepage.process.merge_domain import MergeDomain
from samepage.service.tally import Place

if TYPE_CHECKING:
    from samepage.service.engine import Engine
    from samepage.service.scanner import Scanner

PLACE = ["domain", "cgroup"]

LEFT_ALONE = {
    "none": "no way to swap",
    "quiet": "merged on request only",
    "quiet_wp": "merged on request only",
}
"""By how a process swaps pages."""


class Metrics(Collector):
    """Of one scanner, and of the engines that work beside it. Each `collect` is a new look."""

    def __init__(self, scanner: Scanner, others: Sequence[Engine] = ()) -> None:
        self._scanner, self._others = scanner, others

    def collect(self) -> Iterator[Metric]:
        snapshot = self._scanner.snapshot()
        yield from _of_ksmd(snapshot, self._scanner.knobs())
        yield from _of_all(snapshot)
        yield from self._by_place(snapshot)
        if self._others:
            yield from self._by_engine(snapshot)
        yield _labelled_counter(
            "samepage_joins_refused", "Processes that were not let in.", self._scanner.tally.refused()
        )

    def _by_engine(self, snapshot: Snapshot) -> Iterator[Metric]:
        """What each engine does. The others are asked for their rows, which takes them a look at /proc."""
        values = {self._scanner.name: (len(snapshot.processes), _merged(snapshot), snapshot.counters.bytes_saved)}
        for engine in self._others:
            rows = engine.rows()
            merged = sum(row["merged"] for row in rows) * PAGE_SIZE
            values[engine.name] = len(rows), merged, engine.counters()["bytes_saved"]
        for at, (name, text) in enumerate(BY_ENGINE.items()):
            family = GaugeMetricFamily(name, text, labels=["engine"])
            for engine_name, found in values.items():
                family.add_metric([engine_name], found[at])
            yield family

    def _by_place(self, snapshot: Snapshot) -> Iterator[Metric]:
        tally = self._scanner.tally
        at = tally.look(snapshot.processes)
        saved = shares(snapshot, at)
        now: dict[str, Counter[Place]] = defaultdict(Counter)
        left: Counter[tuple[Place, str]] = Counter()
        for row, place in zip(snapshot.processes, at, strict=True):
            now["samepage_processes"][place] += 1
            now["samepage_merged_bytes"][place] += row.merged * PAGE_SIZE
            now["samepage_known_bytes"][place] += (row.ksm_rmap_items + row.ksm_zero_pages) * PAGE_SIZE
            if why := left_alone(row):
                left[place, why] += 1
        now["samepage_saved_bytes"] = saved
        for name, text in BY_PLACE.items():
            family = GaugeMetricFamily(name, text, labels=PLACE)
            for place, value in now[name].items():
                family.add_metric([place.domain, place.cgroup], value)
            yield family
        family = GaugeMetricFamily(
            "samepage_processes_left_alone", "Processes that joined and are not merged now.", labels=[*PLACE, "why"]
        )
        for (place, why), value in left.items():
            family.add_metric([place.domain, place.cgroup, why], value)
        yield family
        yield from _counted(tally.places())


BY_ENGINE = {
    "samepage_engine_processes": "Processes that an engine serves.",
    "samepage_engine_merged_bytes": "Merged pages of these.",
    "samepage_engine_saved_bytes": "Memory that an engine saves; the kernel's counters are for the whole machine.",
}

BY_PLACE = {
    "samepage_processes": "Processes that joined.",
    "samepage_saved_bytes": "Memory saved, net: less what segments hold for nobody, and what fork would have shared.",
    "samepage_merged_bytes": "Merged pages: what it would take if all of them were written at once.",
    "samepage_known_bytes": "Memory that ksmd knows the pages of.",
}


def _merged(snapshot: Snapshot) -> int:
    return sum(row.merged for row in snapshot.processes) * PAGE_SIZE


def _of_ksmd(snapshot: Snapshot, knobs: dict[str, str]) -> Iterator[Metric]:
    """node_exporter's, by its names and with its units."""
    counters = snapshot.counters
    full_scans = CounterMetricFamily("node_ksmd_full_scans", "How often all mergeable memory was looked at.")
    full_scans.add_metric([], counters.full_scans)
    yield full_scans
    for name in ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile", "run"):
        yield GaugeMetricFamily(f"node_ksmd_{name}", f"ksmd '{name}' file.", getattr(counters, name))
    for name in ("merge_across_nodes", "pages_to_scan"):
        yield GaugeMetricFamily(f"node_ksmd_{name}", f"ksmd '{name}' file.", float(knobs[name]))
    sleep = float(knobs["sleep_millisecs"]) / 1000
    yield GaugeMetricFamily("node_ksmd_sleep_seconds", "ksmd 'sleep_millisecs' file.", sleep)
    profit = counters.general_profit
    yield GaugeMetricFamily("node_ksmd_general_profit_bytes", "ksmd 'general_profit' file.", profit)


def _of_all(snapshot: Snapshot) -> Iterator[Metric]:
    counters = snapshot.counters
    yield GaugeMetricFamily("samepage_metadata_bytes", "What knowing the pages takes.", counters.metadata_bytes)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_SIZE
    yield GaugeMetricFamily("samepage_service_resident_bytes", "Resident memory of the service.", resident)
    waiting = GaugeMetricFamily(
        "samepage_pages_waiting", "Pages with an equal that are not merged now, by reason.", labels=["why"]
    )
    for why in ("deferred", "collided", "unmerged_vma", "broken"):
        waiting.add_metric([why], getattr(counters, f"pages_{why}"))
    yield waiting
    yield _counter("samepage_cpu_seconds", "CPU time of ksmd and, for it, of all agents.", counters.cpu_seconds)
    yield _counter("samepage_service_cpu_seconds", "CPU time of the service, ksmd's included.", time.process_time())
    yield _counter("samepage_metrics_cpu_seconds", "CPU time of the thread that serves metrics.", time.thread_time())
    failures = {name.lower(): value for name, value in counters.merge_failures.items()}
    yield _labelled_counter("samepage_merge_failures", "Pages that were not merged, by reason.", failures)


def _counted(places: list[Place]) -> Iterator[Metric]:
    cpu = CounterMetricFamily("samepage_agent_cpu_seconds", "CPU time of agents, in the processes.", labels=PLACE)
    unmerges = CounterMetricFamily(
        "samepage_unmerges", "Unmerges of a process that were asked for, by outcome.", labels=[*PLACE, "outcome"]
    )
    dropped = CounterMetricFamily(
        "samepage_processes_dropped", "Processes not served any more, by reason.", labels=[*PLACE, "why"]
    )
    stalls = HistogramMetricFamily(
        "samepage_stall_seconds", "How long threads of applications were held up, at most.", labels=PLACE
    )
    for place in places:
        cpu.add_metric([place.domain, place.cgroup], place.cpu_seconds)
        stalls.add_metric([place.domain, place.cgroup], _buckets(place.stalls), place.stalls.ns / 1e9)
        for outcome, value in list(place.unmerges.items()):
            unmerges.add_metric([place.domain, place.cgroup, outcome], value)
        for why, value in list(place.dropped.items()):
            dropped.add_metric([place.domain, place.cgroup, why], value)
    yield from (cpu, stalls, unmerges, dropped)


BOUNDS = [*(f"{us / 1e6:g}" for us in STALLS_US), "+Inf"]


def _buckets(stalls: Stalls) -> list[tuple[str, float]]:
    """Each holds what the ones before it hold, too."""
    return list(zip(BOUNDS, accumulate(map(float, stalls.counts)), strict=True))


def _counter(name: str, text: str, value: float) -> Metric:
    family = CounterMetricFamily(name, text)
    family.add_metric([], value)
    return family


def _labelled_counter(name: str, text: str, values: dict[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=["why"])
    for why, value in values.items():
        family.add_metric([why], value)
    return family


def left_alone(row: ProcessRow) -> str:
    """Why nothing of a process is merged by itself now; "" if nothing keeps it."""
    if row.state != "running":
        return row.state
    return LEFT_ALONE.get(row.swap) or ("" if row.ksm_mergeable else "nothing mergeable")


def shares(snapshot: Snapshot, at: list[Place]) -> Counter[Place]:
    """What each place saves. Whose saving a shared page is cannot be said: a domain's is shared out in proportion to
    the pages that its processes have merged. So all places add up to `bytes_saved`."""
    found: Counter[Place] = Counter()
    by_domain: dict[MergeDomain, list[tuple[ProcessRow, Place]]] = defaultdict(list)
    for row, place in zip(snapshot.processes, at, strict=True):
        by_domain[row.domain].append((row, place))
    for domain in snapshot.domains:
        processes = by_domain.get(domain.domain, [])
        for place, saved in _shared_out(domain, processes):
            found[place] += saved
    return found


def _shared_out(domain: DomainRow, processes: Iterable[tuple[ProcessRow, Place]]) -> Iterator[tuple[Place, int]]:
    weights: Counter[Place] = Counter()
    zeros = 0
    for row, place in processes:
        weights[place] += row.ksm_merging_pages - row.pages_inherited
        zeros += row.ksm_zero_pages
        yield place, row.ksm_zero_pages * PAGE_SIZE
    rest, left = domain.bytes_saved - zeros * PAGE_SIZE, weights.total()
    for n, (place, weight) in enumerate(weights.items(), 1):
        share = rest if n == len(weights) else rest * weight // left if left else 0
        rest, left = rest - share, left - weight
        yield place, share
