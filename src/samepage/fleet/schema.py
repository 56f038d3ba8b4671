"""What a recording is made of: for each look `pages/HOST.LOOK.parquet` and `mappings/HOST.LOOK.parquet`.

Each file appears whole, by rename(2). The file of mappings is written last, and completes the look. Pages name their
mapping, and everything else is a column of the mapping; Parquet stores a value that is the same in a whole file once.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from samepage.fleet import FleetError

VERSION = 1
"""The version of the schema. It goes up when a reader of the old version would get something wrong."""

NAME = pa.dictionary(pa.int32(), pa.string())

PAGES = pa.schema(
    [
        ("host", NAME),
        ("look", pa.int64()),  # when it began, in microseconds since 1970
        ("mapping", pa.int32()),  # `mapping` of the same look in `mappings`
        ("vpn", pa.int64()),  # page number of the first; of a file, in the file
        ("npages", pa.int32()),  # how many neighbours have the same content
        ("hash", pa.int64()),  # keyed; 0: zeros
        ("frame", pa.bool_()),  # the first page found of its frame, which nobody else maps
        ("forked", pa.bool_()),  # its frame is mapped more than once
    ]
)

MAPPINGS = pa.schema(
    [
        ("host", NAME),
        ("look", pa.int64()),
        ("mapping", pa.int32()),
        ("pid", pa.int32()),  # -1: a file
        ("domain", pa.int64()),  # user id; -1: a file
        ("comm", NAME),
        ("service", NAME),  # unit of systemd, else the comm
        ("image", NAME),  # path of the program
        ("kind", NAME),  # samepage.estimate.source.Kind
        ("library", NAME),  # what file is mapped there, "" for none
        ("taken", pa.bool_()),  # `samepage run` takes it
        ("vpn", pa.int64()),
        ("end", pa.int64()),  # the page after its last
        ("pages", pa.int64()),  # that were there
        ("host_bytes", pa.int64()),  # memory of the host
        ("fraction", pa.float64()),  # of the contents that were kept
    ]
)

_PACKED = {"vpn": "DELTA_BINARY_PACKED", "hash": "PLAIN"}
_DICTIONARY = ["host", "mapping", "npages", "comm", "service", "image", "kind", "library"]


@dataclass(frozen=True, slots=True)
class Head:
    """What the metadata of every file says."""

    host: str
    look: int
    key: str
    """The key's fingerprint."""
    fraction: float
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class Recorded:
    """One look of a recording."""

    head: Head
    mappings: Path
    pages: Path


def write(directory: Path, head: Head, mappings: Any, pages: Any) -> int:
    """Write a look (two tables of pyarrow's). Returns the bytes written. Raises OSError (disk full, say)."""
    size = 0
    for name, table in (("pages", pages), ("mappings", mappings)):
        sink = io.BytesIO()
        metadata = {"samepage": json.dumps({field: getattr(head, field) for field in Head.__slots__})}
        columns = set(table.schema.names)
        pq.write_table(
            table.replace_schema_metadata(metadata),
            sink,
            compression="zstd",
            use_dictionary=[column for column in _DICTIONARY if column in columns],
            column_encoding={column: how for column, how in _PACKED.items() if column in columns},
        )
        _put(directory / name, f"{head.host}.{head.look}.parquet", sink.getbuffer())
        size += sink.getbuffer().nbytes
    return size


def _put(directory: Path, name: str, content: memoryview) -> None:
    """Write a file so that it is there whole or not at all, whatever ends this process or the machine."""
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{name}.new"
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(directory / name)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def check_writable(directory: Path) -> None:
    """Raise OSError if nothing can be written there. Call it before looks that take minutes, not after the first."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f".{os.getpid()}").touch()
    (directory / f".{os.getpid()}").unlink()


def forget_unfinished(directory: Path, host: str) -> None:
    """Remove unfinished files of a recorder of this host that was killed. No other may be running."""
    for name in ("pages", "mappings"):
        for path in (directory / name).glob(f".{host}.*.new"):
            with contextlib.suppress(OSError):
                path.unlink()


def looks(directories: Iterable[Path]) -> list[Recorded]:
    """All looks of these recordings, ascending by time. Raises FleetError: there are none, or some don't go
    together."""
    found = []
    for directory in directories:
        if not directory.is_dir():
            raise FleetError(f"no such directory: {directory}")
        for mappings in (directory / "mappings").glob("*.parquet"):
            pages = directory / "pages" / mappings.name
            if pages.exists():
                found.append(Recorded(_head(mappings), mappings, pages))
        if not found or not found[-1].mappings.is_relative_to(directory):
            raise FleetError(f"there is no recording in {directory}")
    _check_together(found)
    return sorted(found, key=lambda look: (look.head.look, look.head.host))


def _head(path: Path) -> Head:
    try:
        metadata = pq.read_metadata(path).metadata or {}
        head = Head(**json.loads(metadata[b"samepage"]))
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError):
        raise FleetError(f"{path} is no recording of samepage's, or of a newer version") from None
    if head.version != VERSION:
        raise FleetError(f"{path} is a recording of version {head.version}; this samepage knows {VERSION}")
    return head


def _check_together(found: list[Recorded]) -> None:
    """Refuse recordings that cannot be compared: with two keys no hashes are equal, and of two samples only the smaller
    could be compared."""
    for what in ("key", "fraction"):
        by_value = {getattr(look.head, what): look.mappings for look in found}
        if len(by_value) > 1:
            (one, first), (other, second) = list(by_value.items())[:2]
            raise FleetError(
                f"recordings with different {what}s cannot be joined: {first} ({one}) and {second} ({other})"
            )
    seen: dict[tuple[str, int], Path] = {}
    for look in found:
        if (before := seen.setdefault((look.head.host, look.head.look), look.mappings)) != look.mappings:
            raise FleetError(f"{before} and {look.mappings} are the same look of the same host")
