"""Blocks in the heaps of glibc's malloc, and what their pages would be if each block were a mapping of its own.

malloc begins a block wherever there is room in its heap. So equal data in two blocks lies at different offsets within
its pages, and page by page nothing of it is equal. `samepage run` serves blocks of `LEAST` bytes and more at the start
of a page. A block that malloc maps by itself begins 16 bytes after the start of one. Blocks of its heaps are hashed as
if they did, too: then they can be compared with those, and with each other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from samepage.arrays import Bools, Ints
from samepage.estimate import pages
from samepage.estimate.source import Kind, Left, Mapping
from samepage.memory import PAGE_SIZE, U64

LEAST = 64 << 10
"""Bytes of the smallest block that `samepage run` serves (MIN_ALLOC_LEAST in agent/hooks/wrappers.c)."""

# A chunk (struct malloc_chunk in malloc/malloc.c): bytes of the one before, its own bytes with three flags, and the
# block. The block goes on over the first word of the next chunk, whose second word says whether it is in use.
ALIGN, WORD = 16, 8
PREV_INUSE, IS_MMAPPED, FLAGS = 1, 2, 7

PIECE_PAGES = 256
CANDIDATES = 1024
"""Words of a piece that are tried, at most. There is room for 16 such blocks in it."""


@dataclass(slots=True)
class HeapPages:
    """Pages of a heap, or a part of one, that are there: their page numbers (ascending), which of them no other process
    has, and the row of each (-1: a sample does not keep it). `end` is the address that the heap ends at."""

    vpns: Ints
    alone: Bools
    rows: Ints
    end: int


@dataclass(slots=True)
class Moved:
    """Blocks of a heap: how many; the rows that are theirs now, and the checksums of the pages they would have."""

    count: int
    rows: Ints
    checksum: U64


def is_heap(mapping: Mapping) -> bool:
    """Whether glibc's malloc has small blocks there: the brk heap, or an arena of threads."""
    if mapping.kind is Kind.HEAP:
        return mapping.left in (None, Left.LARGE_ONLY)
    return mapping.kind is Kind.ANONYMOUS and mapping.left is Left.BLOCKS


def moved(fd: int, heap: HeapPages) -> Moved:
    """Its blocks. `fd` is /proc/PID/mem. Pages that are not there are not read."""
    vpns, their_rows = heap.vpns[heap.alone], heap.rows[heap.alone]
    rows, sums = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    chunks = _chunks(fd, heap)
    for chunk, size in chunks:
        first, end = np.searchsorted(vpns, (-(-(chunk + ALIGN) // PAGE_SIZE), (chunk + size) // PAGE_SIZE))
        rows.append(their_rows[first:end])
        page, shift = divmod(chunk, PAGE_SIZE)
        first, end = np.searchsorted(vpns, (page + 1, page + (size + WORD) // PAGE_SIZE + (shift > 0)))
        there = vpns[first:end]
        if shift:  # each lies in two pages
            there = there[:-1][np.diff(there) == 1]
        sums.append(_checksums(fd, pages.runs(there, shift), len(there)))
    kept = np.concatenate(rows)
    return Moved(len(chunks), kept[kept >= 0], np.concatenate(sums))


def _checksums(fd: int, runs: pages.Runs, npages: int) -> U64:
    sums, states = np.empty(npages, np.uint64), np.empty(npages, np.uint8)
    pages.hash_runs(fd, runs, sums, states)
    out: U64 = sums[states != 0]
    return out


def _chunks(fd: int, heap: HeapPages) -> list[tuple[int, int]]:
    """Address and bytes of each chunk in use with a block of at least `LEAST` bytes, ascending.

    A heap of small blocks has millions, so we do not go from chunk to chunk: we look for words that say such a size,
    and have the header of a chunk where that would end."""
    found: list[tuple[int, int]] = []
    after = 0
    for start, words in _pieces(fd, heap):
        sizes = words & ~np.uint64(FLAGS)
        fits = (words & np.uint64(IS_MMAPPED | WORD) == 0) & (sizes >= LEAST + ALIGN) & (sizes <= heap.end - start)
        at = np.flatnonzero(fits)[:CANDIDATES]
        for place, size in zip(at.tolist(), sizes[at].tolist(), strict=True):
            chunk = start + place * ALIGN
            if chunk >= after and _is_header(fd, heap, chunk + size):
                found.append((chunk, size))
                after = chunk + size
    return found


def _pieces(fd: int, heap: HeapPages) -> Iterator[tuple[int, U64]]:
    """Address of each piece, and the second word of every 16 bytes in it."""
    for start, npages in pages.runs(heap.vpns, 0).tolist():
        for at in range(0, npages, PIECE_PAGES):
            address = start + at * PAGE_SIZE
            data = _read(fd, address, min(PIECE_PAGES, npages - at) * PAGE_SIZE)
            yield address, np.frombuffer(data, np.uint64)[1::2]


def _is_header(fd: int, heap: HeapPages, address: int) -> bool:
    """Whether a chunk starts there, and the one before it is in use."""
    word = address + WORD
    place = int(np.searchsorted(heap.vpns, word // PAGE_SIZE))
    if word + WORD > heap.end or place == len(heap.vpns) or heap.vpns[place] != word // PAGE_SIZE:
        return False
    size = int.from_bytes(_read(fd, word, WORD), "little")
    chunk = size & ~FLAGS
    return size & PREV_INUSE != 0 and size & (IS_MMAPPED | WORD) == 0 and ALIGN < chunk <= heap.end - address


def _read(fd: int, address: int, size: int) -> bytes:
    """Whole pairs of words that are there; none if the process has gone."""
    try:
        data = os.pread(fd, size, address)
    except OSError:
        return b""
    return data[: len(data) // ALIGN * ALIGN] if size >= ALIGN else data
