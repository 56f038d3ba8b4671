"""Fleets that do not exist: hosts with perturbed copies of what was recorded.

Each service has variants, as releases and customers make them. A host has some of these, repeated until its memory is
full. A share of a copy's pages is as in all copies of its variant, another share as in all copies of the service, and
no other copy has the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from samepage.arrays import Ints
from samepage.fleet import FleetError, schema
from samepage.fleet.schema import Head, Recorded
from samepage.memory import PAGE_SIZE, U64

COMMON, OF_VARIANT = 0.25, 0.35
"""The shares of a copy's pages that all copies of the service have, and that all copies of its variant have."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How many hosts, and what is on each."""

    hosts: int
    host_bytes: int
    services_a_host: int = 8
    variants: int = 3
    key: str = "synthetic"


def make(templates: Iterable[Recorded], shape: Shape, directory: Path, seed: int = 0) -> int:
    """Write a look of each host to `directory`. Returns how many rows of pages there are. Raises FleetError."""
    services = _services(templates)
    if not services:
        raise FleetError("there are no pages in these recordings")
    fraction = next(iter(services.values())).fraction
    rows = 0
    for host in range(shape.hosts):
        rng = np.random.default_rng((seed, host))
        rows += _host(services, shape, fraction, f"host{host:05}", rng, directory)
    return rows


@dataclass(frozen=True, slots=True)
class _Service:
    hashes: U64
    library: list[str]
    of_library: Ints
    image: str
    fraction: float


def _services(templates: Iterable[Recorded]) -> dict[str, _Service]:
    """The pages of each recorded service that have content."""
    out: dict[str, _Service] = {}
    for look in templates:
        mappings = pq.read_table(look.mappings).to_pandas()
        pages = pq.read_table(look.pages).to_pandas()
        pages = pages[(pages["hash"] != 0) & pages["frame"]].merge(
            mappings[["mapping", "service", "image", "library"]].astype({"service": str, "image": str, "library": str}),
            on="mapping",
        )
        for service, mine in pages.groupby("service"):
            libraries, of_library = np.unique(mine["library"].to_numpy(str), return_inverse=True)
            hashes = mine["hash"].to_numpy().view(np.uint64)
            image = str(mine["image"].iloc[0])
            out[str(service)] = _Service(
                hashes, [str(name) for name in libraries], of_library, image, look.head.fraction
            )
    return out


def _host(
    services: dict[str, _Service],
    shape: Shape,
    fraction: float,
    host: str,
    rng: np.random.Generator,
    directory: Path,
) -> int:
    wanted = int(shape.host_bytes / PAGE_SIZE * fraction)
    names = sorted(services)
    chosen = rng.choice(len(names) * shape.variants, min(shape.services_a_host, len(names) * shape.variants), False)
    weights = rng.dirichlet(np.full(len(chosen), 4.0))
    head = Head(host, 1_700_000_000_000_000, shape.key, fraction)
    mappings: list[dict[str, object]] = []
    hashes, numbers = [], []
    for which, weight in zip(chosen.tolist(), weights.tolist(), strict=True):
        service, variant = services[names[which // shape.variants]], which % shape.variants
        at = np.arange(int(wanted * weight))
        hashes.append(_perturbed(service.hashes, at, variant, rng))
        numbers.append(len(mappings) + service.of_library[at % len(service.hashes)])
        for library in service.library:
            about = {"host": host, "look": head.look, "mapping": len(mappings), "pid": 1000 + which, "domain": 0}
            what = {"service": f"{names[which // shape.variants]}.{variant}", "image": service.image, "comm": "x"}
            where = {"vpn": 0, "end": 1, "pages": 1, "kind": "anonymous", "library": library, "taken": True}
            mappings.append(about | what | where | {"host_bytes": shape.host_bytes, "fraction": fraction})
    content, mapping = np.concatenate(hashes), np.concatenate(numbers).astype(np.int32)
    yes, count = np.ones(len(content), np.bool_), len(content)
    columns = {
        "host": pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), [host]),
        "look": np.full(count, head.look),
        "mapping": mapping,
        "vpn": np.arange(count, dtype=np.int64) * round(1 / fraction),
        "npages": np.ones(count, np.int32),
        "hash": content.view(np.int64),
        "frame": yes,
        "forked": ~yes,
    }
    table = pa.table({name: pa.array(values) for name, values in columns.items()}, schema.PAGES)
    schema.write(directory, head, pa.Table.from_pylist(mappings, schema.MAPPINGS), table)
    return count


def _perturbed(hashes: U64, at: Ints, variant: int, rng: np.random.Generator) -> U64:
    """The contents of the pages `at` of a copy. The service has these contents, repeated as often as needed."""
    n = len(hashes)
    repeated = hashes[at % n] ^ (at // n).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    own = rng.integers(1, 1 << 63, len(at), np.uint64)
    # Which pages are whose is the same on all hosts.
    lot = (repeated * np.uint64(0xD6E8FEB86659FD93) >> np.uint64(40)).astype(np.float64) / (1 << 24)
    of_variant = repeated ^ np.uint64((variant + 1) * 0xA0761D6478BD642F % (1 << 64))
    out: U64 = np.where(lot < COMMON, repeated, np.where(lot < COMMON + OF_VARIANT, of_variant, own))
    out[out == 0] = 1
    return out
