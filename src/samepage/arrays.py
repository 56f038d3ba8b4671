"""What ksmd and the estimate both do with arrays of page numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


def expand(starts: npt.NDArray[Any], lengths: npt.NDArray[Any]) -> Ints:
    """`[start, start + length)` of every run, one after the other."""
    starts, lengths = starts.astype(np.int64), lengths.astype(np.int64)
    if len(starts) == 1:
        return np.arange(starts[0], starts[0] + lengths[0], dtype=np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total, dtype=np.int64)


def run_starts(*columns: npt.NDArray[Any]) -> Ints:
    """Where runs begin in which every column goes up by one from row to row. Columns are of integers."""
    n = len(columns[0])
    starts = np.zeros(n, np.bool_)
    starts[:1] = True
    for column in columns:
        starts[1:] |= column[1:] != column[:-1] + column.dtype.type(1)
    return np.flatnonzero(starts)
