"""What is equal within and between hosts, and whose it is: queries written once, as Ibis expressions, for any engine.

A *workload* is a service on a host, which a scheduler could put elsewhere. All counts are of sampled pages; divide them
by the sample's fraction to get those of all pages. Zeros are left out, and so are frames that are shared already.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ibis
from ibis import _

from samepage.fleet.schema import Recorded

TOP = 20
"""How many pairs and groups are listed."""


@dataclass(frozen=True, slots=True)
class Amount:
    """How many pages something has, and how many different contents."""

    name: str
    pages: int
    contents: int

    @property
    def duplicate(self) -> int:
        """How many pages merging all of it would free."""
        return self.pages - self.contents


@dataclass(frozen=True, slots=True)
class Together:
    """Services, and how many contents are in all of them (a pair), or in all of them and in no other service (a
    group)."""

    services: tuple[str, ...]
    contents: int


@dataclass(frozen=True, slots=True)
class Workload:
    """A service on a host."""

    host: str
    service: str
    pages: int


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers to all queries, the same from every engine."""

    fraction: float
    hosts: list[Amount]
    services: list[Amount]
    images: list[Amount]
    libraries: list[Amount]
    pages: int
    contents: int
    pairs: list[Together]
    groups: list[Together]
    workloads: list[Workload]

    @property
    def within(self) -> int:
        """How many pages merging within each host would free."""
        return sum(host.duplicate for host in self.hosts)

    @property
    def between(self) -> int:
        """How many more pages would be freed if all were on one host."""
        return self.pages - self.contents - self.within


def latest(looks: Iterable[Recorded]) -> list[Recorded]:
    """The last look of each host."""
    by_host = {look.head.host: look for look in sorted(looks, key=lambda look: look.head.look)}
    return [by_host[host] for host in sorted(by_host)]


def duckdb(looks: list[Recorded], memory: int, directory: Path) -> Any:
    """Load these looks into DuckDB in this process. It takes `memory` bytes, and uses `directory` for what needs
    more."""
    connection = ibis.duckdb.connect(
        memory_limit=f"{memory >> 20}MiB", temp_directory=str(directory), preserve_insertion_order=False
    )
    connection.read_parquet([str(look.pages) for look in looks], table_name="pages")
    connection.read_parquet([str(look.mappings) for look in looks], table_name="mappings")
    return connection


def spark(looks: list[Recorded], session: Any) -> Any:
    """Load these looks into a Spark session, all of whose executors must see the files."""
    for name in ("pages", "mappings"):
        session.read.parquet(*(str(getattr(look, name)) for look in looks)).createOrReplaceTempView(name)
    return ibis.pyspark.connect(session)


class Fleet:
    """The last looks of many hosts, in an engine of Ibis's (`connection`) that has them as tables `pages` and
    `mappings`."""

    def __init__(self, connection: Any, fraction: float) -> None:
        self._fraction = fraction
        mappings = connection.table("mappings")
        self._hosts = mappings.group_by("host").agg(size=_.host_bytes.max()).mutate(host=_.host.cast("string"))
        self._names = {}
        for column in ("host", "service", "image", "library"):
            mappings = mappings.mutate(**{f"{column}_number": ibis.dense_rank().over(order_by=column).cast("int32")})
        numbers = ["host_number", "service_number"]
        mappings = mappings.mutate(workload=ibis.dense_rank().over(order_by=numbers).cast("int32"))
        mappings = mappings.cache()
        for column in ("host", "service", "image", "library"):
            named = mappings.select(number=mappings[f"{column}_number"], name=mappings[column].cast("string"))
            self._names[column] = dict(_rows(named.distinct()))
        self._about = mappings.select("workload", *numbers).distinct().cache()
        pages = connection.table("pages").filter(_.frame, _.hash != 0)
        joined = pages.join(mappings, ["host", "look", "mapping"])
        self._pages = joined.select("hash", "workload", "image_number", "library_number", "npages")
        self._held = self._pages.group_by("hash", "workload").agg(n=_.npages.sum().cast("int32")).cache()

    def ask(self) -> Answers:
        """Run all queries."""
        held = self._held.join(self._about, "workload")
        by_host = held.group_by("hash", "host_number").agg(n=_.n.sum())
        by_service = held.group_by("hash", "service_number").agg(n=_.n.sum()).cache()
        totals = by_service.group_by("hash").agg(n=_.n.sum()).agg(pages=_.n.sum(), contents=_.count())
        ((pages, contents),) = _rows(totals) or [(0, 0)]
        return Answers(
            self._fraction,
            self._amounts(by_host, "host"),
            self._amounts(by_service, "service"),
            self._amounts(self._by("image_number"), "image"),
            self._amounts(self._by("library_number"), "library"),
            int(pages or 0),
            int(contents),
            *self._together(by_service),
            self._workloads(),
        )

    def _by(self, column: str) -> Any:
        return self._pages.group_by("hash", column).agg(n=_.npages.sum())

    def _amounts(self, by: Any, what: str) -> list[Amount]:
        found = by.group_by(f"{what}_number").agg(pages=_.n.sum(), contents=_.count())
        amounts = [
            Amount(self._names[what][number], int(pages), int(contents)) for number, pages, contents in _rows(found)
        ]
        return sorted(
            (amount for amount in amounts if amount.name or what != "library"), key=lambda a: (-a.duplicate, a.name)
        )

    def _together(self, by_service: Any) -> tuple[list[Together], list[Together]]:
        """The pairs and groups of services that have most in common."""
        common = (
            by_service.group_by("hash")
            .agg(low=_.service_number.min(), high=_.service_number.max())
            .filter(_.low != _.high)
            .select("hash")
        )
        held = by_service.select("hash", "service_number").join(common, "hash").cache()
        other = held.view()
        pairs = (
            held.join(other, [held.hash == other.hash, held.service_number < other.service_number])
            .select(first=held.service_number, second=other.service_number)
            .group_by("first", "second")
            .agg(n=_.count())
        )
        sets = held.group_by("hash").agg(members=_.service_number.collect()).mutate(members=_.members.sort())
        groups = sets.group_by("members").agg(n=_.count())
        return (
            self._top([((first, second), n) for first, second, n in _rows(pairs)]),
            self._top([(tuple(members), n) for members, n in _rows(groups)]),
        )

    def _top(self, found: list[tuple[tuple[int, ...], int]]) -> list[Together]:
        names = self._names["service"]
        together = [Together(tuple(names[number] for number in numbers), int(n)) for numbers, n in found]
        return sorted(together, key=lambda t: (-t.contents, t.services))[:TOP]

    def _workloads(self) -> list[Workload]:
        sizes = self._held.group_by("workload").agg(n=_.n.sum()).join(self._about, "workload")
        rows = _rows(sizes.select("host_number", "service_number", "n"))
        return [
            Workload(self._names["host"][host], self._names["service"][service], int(n))
            for host, service, n in sorted(rows)
        ]

    def host_bytes(self) -> dict[str, int]:
        """The memory of each host."""
        return dict(_rows(self._hosts))

    def shared_sets(self, every: int) -> list[tuple[tuple[int, ...], int]]:
        """Which contents more than one workload has: sets of their numbers in `Answers.workloads`, and how many
        contents each has, extrapolated from one in `every` (a power of two)."""
        held = self._held.filter((_.hash & (every - 1)) == 0)
        sets = held.group_by("hash").agg(members=_.workload.collect(), n=_.count()).filter(_.n > 1)
        sets = sets.mutate(members=_.members.sort()).group_by("members").agg(n=_.count())
        known = sorted(number for (number,) in _rows(self._held.select("workload").distinct()))
        numbers = {number: i for i, number in enumerate(known)}
        return sorted((tuple(numbers[m] for m in members), int(n) * every) for members, n in _rows(sets))


def _rows(expression: Any) -> list[tuple[Any, ...]]:
    table = expression.to_pyarrow()
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True)) if table.num_rows else []
