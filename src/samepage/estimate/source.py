"""What a scan looks at: a process or a file, as mappings and the pages in them.

A source knows nothing of content. It says which pages there are, what the kernel knows of each, and where to read them;
`look` reads and hashes them, of many sources at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol

import numpy as np

from samepage.arrays import Ints
from samepage.memory import U8, U64

BATCH_PAGES = 1 << 15
"""Pages that are read and hashed as one piece of work (128 MiB)."""


class ScanError(Exception):
    """Something that cannot be looked at; the message is one line and names it."""


class NoMemory(ScanError):
    """A process that has no memory: a kernel thread, or one that has ended."""


class Denied(ScanError):
    """A process that this user may not look at."""


class PageFlag:
    """What is known of one page besides its content (u8).

    A *frame* is a page of physical memory; several pages of several processes may be mapped from one frame.
    """

    FRAME = np.uint8(1)
    """The first page met of its frame."""
    OUTSIDE = np.uint8(2)
    """A process that is not looked at maps the frame, too, or nobody can say whether one does."""
    SHARED = np.uint8(4)
    """The frame is mapped more than once (bit 56 of /proc/PID/pagemap is clear)."""
    KSM = np.uint8(8)
    """Merged by the kernel (KPF_KSM)."""
    HUGE = np.uint8(16)
    """In a huge page (KPF_THP; without page flags, PAGE_IS_HUGE: only those that are mapped whole)."""
    ELSEWHERE = np.uint8(32)
    """No anonymous memory but shared for good: a segment of samepage's, or the kernel's page of zeros. Not read."""
    UNREADABLE = np.uint8(64)
    """Was there, and could not be read. It has no checksum."""
    TAKEN = np.uint8(128)
    """`samepage run` would take it: in a large allocation, or advised MADV_MERGEABLE."""


class Kind(StrEnum):
    """What a mapping is."""

    HEAP = "heap"
    STACK = "stack"
    FILE = "file"
    """Private pages of a mapped file or library: what was written of it."""
    ALLOCATION = "allocation"
    """A large block of malloc's, which is a mapping of its own."""
    ANONYMOUS = "anonymous"
    """Any other anonymous memory: allocators' arenas, stacks of threads."""
    SEGMENT = "segment"
    """Memory that samepage merged."""
    IMAGE = "image"
    """Memory of a machine, or of a core dump that does not say what it was."""


class Left(StrEnum):
    """Why `samepage run` leaves a mapping alone."""

    BLOCKS = "small blocks of libc's malloc"
    STACK = "stacks"
    FILE = "data of programs and libraries"
    STATIC = "statically linked programs"
    SMALL = "processes of less than 16 MiB"
    LARGE_ONLY = "left by --memory large alone"
    """What programs map themselves, blocks of malloc's below 1 MiB that are mappings of their own, and the brk heap."""


@dataclass(slots=True, frozen=True)
class Mapping:
    """A mapping (struct vm_area_struct). `start` and `end` are addresses in bytes."""

    start: int
    end: int
    kind: Kind
    name: str
    taken: bool = False
    """`samepage run --memory large` takes all of it."""
    left: Left | None = None
    """Why it does not, where that is known."""
    stretch: int = 0
    """Where the mappings of the same kind that follow without a gap end: MADV_HUGEPAGE for all but the first page of an
    array, as numpy has it, makes two mappings of one allocation."""


@dataclass(slots=True)
class Batch:
    """Some pages of a source, at most `BATCH_PAGES`, in the order of their addresses.

    `vpns` has the page number of each (address divided by the page size) and `flags` its `PageFlag`. Where page `vpn`
    is in the file behind the descriptor, in bytes: `vpn * PAGE_SIZE + shift`. `frames` has a page frame number for each
    page flagged SHARED or KSM and not ELSEWHERE, in order, and `mapcounts` how often that frame is mapped; both are
    None where the kernel does not tell."""

    vpns: Ints
    flags: U8
    shift: int = 0
    frames: U64 | None = None
    mapcounts: U64 | None = None


@dataclass(slots=True)
class Opened:
    """A source that is being read: `fd` to read from, its mappings (ascending by address), and the pages to come.

    `remarks` and `swapped` (pages that are not in memory; reading them would bring them back) are whole when `batches`
    is at its end. `map_count` is how many mappings there are, also such as no page is looked at of; None for a file.
    """

    fd: int
    mappings: list[Mapping]
    batches: Iterator[Batch]
    map_count: int | None = None
    swapped: int = 0
    remarks: list[str] = field(default_factory=list)
    gone: bool = False
    """The process has ended, or become another program, before all of its pages were seen."""
    more: tuple[int, ...] = ()
    """Other descriptors to be closed with `fd`."""


class Source(Protocol):
    """A process or a file."""

    @property
    def name(self) -> str:
        """A process's comm, a file's path."""
        ...

    @property
    def pid(self) -> int | None:
        """None for a file."""
        ...

    @property
    def uid(self) -> int | None:
        """Its merge domain; None for a file."""
        ...

    def expected_pages(self) -> int:
        """About how many pages it has, for the progress bar. Raises nothing: 0 where that is not known."""
        ...

    def open(self) -> Opened:
        """Start reading it. ScanError when that cannot be."""
        ...

    def alive(self) -> bool:
        """Whether it still is there."""
        ...


def label(source: Source) -> str:
    """What people call it."""
    return source.name if source.pid is None else f"{source.name} ({source.pid})"


def with_stretch(mappings: list[Mapping]) -> list[Mapping]:
    """The same, ascending, with `stretch` filled in."""
    out: list[Mapping] = []
    for mapping in reversed(mappings):
        after = out[-1] if out else None
        joins = after is not None and after.start == mapping.end and after.kind is mapping.kind
        out.append(replace(mapping, stretch=after.stretch if after is not None and joins else mapping.end))
    return out[::-1]
