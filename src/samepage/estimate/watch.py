"""Comparing two looks: which pages are as they were."""

from __future__ import annotations

import numpy as np

from samepage.arrays import Bools, Ints
from samepage.estimate.groups import BLOCK
from samepage.estimate.look import Look
from samepage.estimate.source import PageFlag


def unchanged(before: Look, now: Look, unchanged_before: Bools | None) -> Bools:
    """Which rows of `now` are pages that were at the same place with the same content before. Both were looked at with
    `keep_vpns`, at the same `Source` objects. `unchanged_before`: of the rows of `before`, those that count as
    unchanged then; None: all do."""
    same = np.zeros(now.rows, np.bool_)
    old_rows = {id(rows.source): rows for rows in before.sources}
    for rows in now.sources:
        old = old_rows.get(id(rows.source))
        if old is None or old.first == old.end:
            continue
        for at in range(rows.first, rows.end, BLOCK):
            end = min(at + BLOCK, rows.end)
            vpns = _vpns(now, at, end)
            low = _row_at(before, old.first, old.end, int(vpns[0]))
            high = _row_at(before, old.first, old.end, int(vpns[-1]) + 1)
            if low == high:
                continue
            old_vpns = _vpns(before, low, high)
            place = np.searchsorted(old_vpns, vpns)
            place[place == len(old_vpns)] = 0
            equal = (old_vpns[place] == vpns) & (before.checksum[low + place] == now.checksum[at:end])
            equal &= (before.flags[low + place] | now.flags[at:end]) & PageFlag.UNREADABLE == 0
            if unchanged_before is not None:
                equal &= unchanged_before[low + place]
            same[at:end] = equal
    return same


def _vpns(look: Look, first: int, end: int) -> Ints:
    """The page numbers of rows [first, end), all of one source."""
    assert look.start_vpns is not None
    low = int(np.searchsorted(look.starts, first, "right")) - 1
    high = int(np.searchsorted(look.starts, end))
    starts = look.starts[low:high].astype(np.int64)
    length = np.diff(np.append(starts, end))
    vpns: Ints = np.arange(int(starts[0]), end) + np.repeat(look.start_vpns[low:high] - starts, length)
    return vpns[first - int(starts[0]) :]


def _row_at(look: Look, first: int, end: int, vpn: int) -> int:
    """The first row of [first, end), all of one source, that is at `vpn` or after it; `end` if there is none."""
    assert look.start_vpns is not None
    low = int(np.searchsorted(look.starts, first, "right")) - 1
    high = int(np.searchsorted(look.starts, end))
    run = low + int(np.searchsorted(look.start_vpns[low:high], vpn, "right")) - 1
    if run < low:
        return first
    after = int(look.starts[run + 1]) if run + 1 < high else end
    return max(first, min(int(look.starts[run]) + vpn - int(look.start_vpns[run]), after))
