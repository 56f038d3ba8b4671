"""Which of the matched pages a process can afford to merge. Mappings are its scarcest resource, and `max_overcommit`
may limit what its memory cgroup takes on."""

from __future__ import annotations

import numpy as np

from samepage.arrays import Bools, Ints, run_starts
from samepage.ksmd import settle
from samepage.ksmd.domain import Domain
from samepage.ksmd.exchange import COPY
from samepage.ksmd.merge_work import MergeWork
from samepage.ksmd.mm_slot import MmSlot
from samepage.ksmd.rmap import PageState
from samepage.ksmd.stable import SEGMENT_PAGES
from samepage.memory import U32, U64

ROUNDS = 8
"""How often pages are chosen: what one process cannot afford leaves others with less, in more pieces."""

STRETCH = 64
"""Extents that are chosen together, at most: one mapping more for as many is little."""


def within_budget(domain: Domain, refs: U32, target: U64, work: MergeWork) -> tuple[Bools, U32]:
    """Which of the matched pages to merge (`refs` ascend, each with its target), and which to copy; these may be pages
    that are not merged themselves. The others are tried again later."""
    donors: U32 = refs[target == COPY + refs]
    counts = work.each(dict.fromkeys(slot for slot, _ in domain.cut(refs)), _map_count)
    mapped = np.ones(len(refs), np.bool_)
    for _ in range(ROUNDS):
        part = _with_mappings(domain, refs[mapped], target[mapped], counts)
        if part.all():
            break
        mapped[mapped] = part
        _keep_no_lone_copies(target, donors, mapped)  # which cuts extents of those that have mappings enough
    may = np.ones(len(refs), np.bool_)
    may[mapped] = may_merge(domain, refs[mapped], target[mapped], work)
    keep: Bools = mapped & may
    if not keep.all():
        donors = donors[_keep_no_lone_copies(target, donors, keep)]
        settle.defer(domain, refs[~keep & may], work, PageState.OVER_BUDGET)
        settle.defer(domain, refs[~may], work)
    return keep, donors


def _with_mappings(domain: Domain, refs: U32, target: U64, counts: dict[MmSlot, int]) -> Bools:
    """If a process has too few mappings for all its pages, choose those that save most for each."""
    keep = np.ones(len(refs), np.bool_)
    for slot, (at, vpns) in domain.by_memory(refs).items():
        count = counts.get(slot)
        if count is None:  # it is gone
            continue
        starts = run_starts(vpns, target[at])
        length = np.diff(np.append(starts, len(at)))
        meets = vpns[starts[1:]] == vpns[starts[1:] - 1] + 1
        keep[at] = np.repeat(affordable(length, meets, count), length)
    return keep


def affordable(length: Ints, meets: Bools, count: int) -> Bools:
    """Which extents to map with `count` mappings. `length`: their pages; `meets`: whether each but the first follows
    the one before without a gap."""
    cost = -(-length // SEGMENT_PAGES)  # a segment's end splits an extent
    if int(cost.sum()) + len(length) - int(np.count_nonzero(meets)) <= count:
        return np.ones(len(length), np.bool_)
    return _worth_most(length, cost, meets, count)


def _worth_most(length: Ints, cost: Ints, meets: Bools, count: int) -> Bools:
    """Those of the stretches that have most pages for each mapping.

    An extent is a mapping, and cuts what is around it: alone it costs two. But of extents that follow one another
    without a gap (`meets`: the one before), only the first cuts. So pages that lie scattered in the other process cost
    half as many mappings where all of a stretch is merged. Stretches are of extents of about the same length, lest
    short ones come along with long ones, and short, lest the last that fits leaves much unused.
    """
    size = np.frexp(length)[1]
    begins = np.append(True, ~meets | (size[1:] != size[:-1]))
    number = np.arange(len(length))
    since = number - np.maximum.accumulate(np.where(begins, number, 0))
    first = np.flatnonzero(since % max(1, min(STRETCH, count // 16)) == 0)
    mappings = np.add.reduceat(cost, first) + 1
    best = np.argsort(-np.add.reduceat(length, first) / mappings, kind="stable")
    wanted = np.zeros(len(first), np.bool_)
    wanted[best] = np.cumsum(mappings[best]) <= count
    return np.repeat(wanted, np.diff(np.append(first, len(length))))


def _map_count(slot: MmSlot) -> int:
    """How many mappings more the process may have."""
    with slot.waited_for():
        count = slot.space.map_count()
    return max(0, count[1] - count[0])


def _keep_no_lone_copies(target: U64, donors: U32, keep: Bools) -> Bools:
    """Leave out a page if no other page would share its copy: alone it would save nothing. Returns which donors are
    left."""
    to_copy = target >= COPY
    rank = np.searchsorted(donors, (target[to_copy] - COPY).astype(np.uint32))
    shared: Bools = np.bincount(rank[keep[to_copy]], minlength=len(donors)) >= 2
    keep[to_copy] &= shared[rank]
    return shared


def may_merge(domain: Domain, refs: U32, target: U64, work: MergeWork) -> Bools:
    """Which of the ascending refs can be merged without promising their memory cgroups more than `max_overcommit`
    allows. These are taken off the allowance, whatever becomes of them; each slice has a new allowance. Pages of one
    target are accepted together, since one alone would have nobody to share with."""
    may = np.ones(len(refs), np.bool_)
    if work.allowance is None:
        return may
    groups: dict[str, list[Ints]] = {}
    for slot, at in domain.by_slot(refs).items():
        groups.setdefault(slot.group, []).append(at)
    for group, parts in groups.items():
        at = np.concatenate(parts)
        allowed = max(0, work.allowance.get(group, 0))
        may[at[np.argsort(target[at], kind="stable")][allowed:]] = False
        work.allowance[group] = allowed - min(len(at), allowed)
    return may
