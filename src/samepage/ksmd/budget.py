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


def within_budget(domain: Domain, refs: U32, target: U64, work: MergeWork) -> tuple[Bools, U32]:
    """Which of the matched pages to merge (`refs` ascend, each with its target), and which to copy; these may be pages
    that are not merged themselves. The others are tried again later."""
    mapped = _with_mappings(domain, refs, target, work)
    may = np.ones(len(refs), np.bool_)
    may[mapped] = may_merge(domain, refs[mapped], target[mapped], work)
    donors: U32 = refs[target == COPY + refs]
    keep: Bools = mapped & may
    if not keep.all():
        donors = donors[_keep_no_lone_copies(target, donors, keep)]
        settle.defer(domain, refs[~keep & may], work, PageState.OVER_BUDGET)
        settle.defer(domain, refs[~may], work)
    return keep, donors


def _with_mappings(domain: Domain, refs: U32, target: U64, work: MergeWork) -> Bools:
    """If a process has too few mappings for all its pages, choose those of its longest extents."""
    keep = np.ones(len(refs), np.bool_)
    by_memory = domain.by_memory(refs)
    for slot, count in work.each(by_memory, _map_count).items():
        at, vpns = by_memory[slot]
        starts = run_starts(vpns, target[at])
        length = np.diff(np.append(starts, len(at)))
        cost = 2 * -(-length // SEGMENT_PAGES)  # a segment's end splits an extent
        if int(cost.sum()) <= count:
            continue
        wanted = np.ones(len(starts), np.bool_)
        longest = np.argsort(-length, kind="stable")
        wanted[longest] = np.cumsum(cost[longest]) <= count
        keep[at] = np.repeat(wanted, length)
    return keep


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
