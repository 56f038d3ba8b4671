"""Cutting a request to merge that is larger than a packet into several."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from samepage.memory import EXTENT, ZERO_PAGE, wire

MERGE_MAX = 64 << 10
"""Pages in one MERGE packet at most, so that a status byte a page fits into the answer."""

EXTENTS_MAX = wire.BODY_MAX // EXTENT.itemsize


def packets(extents: npt.NDArray[np.void], most: int = MERGE_MAX) -> Iterator[npt.NDArray[np.void]]:
    """Split `extents`, in order, so that each part has at most so many pages (a power of 2), fits into a packet, and so
    does the answer to it."""
    extents = _shorten(extents.astype(EXTENT, copy=False), most)
    ends = np.cumsum(extents["npages"])
    start = 0
    while start < len(extents):
        before = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, before + most, side="right"))
        stop = min(stop, start + EXTENTS_MAX)
        yield extents[start:stop]
        start = stop


def _shorten(extents: npt.NDArray[np.void], most: int) -> npt.NDArray[np.void]:
    """The same pages, with cuts where `most` pages end: so no huge page is cut."""
    start = extents["vpn"].astype(np.int64)
    end = start + extents["npages"].astype(np.int64)
    parts = (end - 1) // most - start // most + 1
    if not np.any(parts > 1):
        return extents
    out = np.repeat(extents, parts)
    nth = np.arange(len(out)) - np.repeat(np.cumsum(parts) - parts, parts)
    first = (np.repeat(start // most, parts) + nth) * most
    begin = np.maximum(first, np.repeat(start, parts))
    out["vpn"] = begin
    out["npages"] = np.minimum(first + most, np.repeat(end, parts)) - begin
    skip = (begin - np.repeat(start, parts)).astype(np.uint64)
    out["offset"] = np.where(out["offset"] == ZERO_PAGE, out["offset"], out["offset"] + skip)
    return out
