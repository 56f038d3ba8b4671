"""Finds each candidate a partner of equal checksum (stable_tree_search, unstable_tree_search_insert).

The pages of a slice are numbered in two ways here. `refs` ascend, and `target` has one entry for each of them. For
matching they are sorted by checksum, and equal ones make a *group*; `_Groups` has one entry for each group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from samepage.arrays import Bools, Ints, expand
from samepage.ksmd.domain import Domain
from samepage.ksmd.exchange import COPY
from samepage.ksmd.index import by_checksum
from samepage.ksmd.stable import SEGMENT_PAGES
from samepage.memory import U32, U64

ALONE = np.uint64((1 << 64) - 1)
"""The target of a page without a partner."""


@dataclass(slots=True)
class Matched:
    """`refs` (ascending) are to be merged, each with its `target`: a stable node, or COPY + the ref of a donor.
    `singles` have no partner. `mates` are those of `refs` that stood in the unstable index."""

    refs: U32
    target: U64
    singles: U32
    mates: U32


@dataclass(slots=True)
class _Groups:
    """Candidates of equal checksum. `members` holds positions in `refs`: `size[g]` of them from `first[g]` on are group
    `g`, those of one process after those of another, and in the order of memory."""

    members: Ints
    first: Ints
    size: Ints
    checksum: U64
    node: Ints
    """The stable node of that content; -1: there is none."""
    mate: Ints
    """The ref in the unstable index with that checksum; -1: there is none."""

    def of(self, g: int) -> Ints:
        """The members of one group."""
        return self.members[self.first[g] : self.first[g] + self.size[g]]

    def numbers(self) -> Ints:
        """The group of each of `refs`."""
        numbers = np.empty(len(self.members), np.int64)
        numbers[self.members] = np.repeat(np.arange(len(self.first)), self.size)
        return numbers


def match(domain: Domain, refs: U32, limit: int) -> Matched:
    """Match candidates with nodes, with one another, and with pages of the unstable index. `limit` is the most pages
    that may share a node (max_page_sharing). Nothing of the domain is changed."""
    groups = _groups(domain, refs)
    goal = _goals(groups, refs)
    many = _are_many(domain, groups, limit)
    target = goal[groups.numbers()]
    # A mate is matched when its group needs a copy made; then it takes part like the others.
    joins = (goal >= COPY) & (goal != ALONE) & (groups.mate >= 0) & ~many
    mates, mate_targets = [groups.mate[joins].astype(np.uint32)], [goal[joins]]
    crowds = many & (groups.size + (groups.mate >= 0) > limit)
    mate, goals = _fill_up(domain, groups, np.flatnonzero(many & ~crowds), refs, limit, target)
    mates.append(mate)
    mate_targets.append(goals)
    for g in np.flatnonzero(crowds).tolist():
        members = groups.of(g)
        mate = groups.mate[g : g + 1][groups.mate[g : g + 1] >= 0].astype(np.uint32)
        goals = _share_out(domain, groups.checksum[g : g + 1], refs[members], mate, limit)
        target[members] = goals[len(goals) - len(members) :]
        if len(goals) > len(members):
            mates.append(mate)
            mate_targets.append(goals[:1])
    return _with_mates(refs, target, np.concatenate(mates), np.concatenate(mate_targets))


def _groups(domain: Domain, refs: U32) -> _Groups:
    in_memory = _in_memory(domain, refs)
    order, sums = by_checksum(domain.checksum[refs[in_memory]])
    first = np.flatnonzero(np.concatenate(([True], sums[1:] != sums[:-1])))
    checksum = sums[first]
    return _Groups(
        members=in_memory[order],
        first=first,
        size=np.diff(np.append(first, len(refs))),
        checksum=checksum,
        node=domain.stable.index.find(checksum),
        mate=domain.unstable.find(checksum),
    )


def _in_memory(domain: Domain, refs: U32) -> Ints:
    """The positions of refs by process, and in the order of its memory: then neighbours have donors that are
    neighbours, whatever the order in which processes told of them."""
    by_memory = domain.by_memory(refs)
    return np.concatenate([by_memory[slot][0] for slot in sorted(by_memory, key=lambda slot: slot.number)])


def _goals(groups: _Groups, refs: U32) -> U64:
    """The target of each group, as long as one node is enough for it: the node that there is, else a copy of its
    donor."""
    lowest = refs[groups.members[groups.first]].astype(np.int64)  # of its first process
    highest = refs[groups.members[groups.first + groups.size - 1]].astype(np.int64)  # of its last
    goal = _copies(groups.mate, lowest, highest, groups.size)
    has_node = groups.node >= 0
    goal[has_node] = groups.node[has_node]
    return goal


def _copies(mate: Ints, lowest: Ints, highest: Ints, size: Ints) -> U64:
    """For `size` pages each, and their mate: a copy of one of them as target; of the mate, if there is one."""
    donor = np.where(mate >= 0, mate, lowest)
    # Every other segment comes from another process, where there is one: donating and merging then keep both busy.
    turn = donor // SEGMENT_PAGES % 2 == 1
    donor[turn] = highest[turn]
    return np.where(size + (mate >= 0) >= 2, COPY + donor.astype(np.uint64), ALONE)


def _are_many(domain: Domain, groups: _Groups, limit: int) -> Bools:
    """Which groups have more pages than one node can take."""
    many: Bools = groups.size + (groups.mate >= 0) > limit
    stable = np.flatnonzero(groups.node >= 0)
    room = limit - domain.stable.sharers[groups.node[stable]].astype(np.int64)
    many[stable] = room < groups.size[stable]
    return many


def _fill_up(domain: Domain, groups: _Groups, some: Ints, refs: U32, limit: int, target: U64) -> tuple[U32, U64]:
    """Targets for groups whose node has no room for all of their pages: first the places that are left on nodes of that
    content, then a copy. Returns the mates that take part, and their targets.

    All at once: a process that comes after `max_page_sharing` others has such a group for each of its pages.
    """
    owner, nodes = domain.stable.index.all(groups.checksum[some])
    room = np.maximum(limit - domain.stable.sharers[nodes].astype(np.int64), 0)
    past = np.cumsum(room)
    places = np.bincount(owner, room, minlength=len(some)).astype(np.int64)
    first, size, mate = groups.first[some], groups.size[some], groups.mate[some]
    placed = np.minimum(size, places)
    seat = expand(np.cumsum(places) - places, placed)
    target[groups.members[expand(first, placed)]] = nodes[np.searchsorted(past, seat, "right")]
    left = np.flatnonzero(placed < size)
    rest, first, last = (size - placed)[left], (first + placed)[left], (first + size - 1)[left]
    lowest, highest = refs[groups.members[first]].astype(np.int64), refs[groups.members[last]].astype(np.int64)
    goal = _copies(mate[left], lowest, highest, rest)
    target[groups.members[expand(first, rest)]] = np.repeat(goal, rest)
    joins = (mate[left] >= 0) & (goal != ALONE)
    return mate[left][joins].astype(np.uint32), goal[joins]


def _share_out(domain: Domain, checksum: U64, members: U32, mate: U32, limit: int) -> U64:
    """Targets for more pages of one content than one node is for: `limit` to each.

    The pages go round over the nodes (or the copies to be made), so that of a long run of equal pages each stretch maps
    a stretch of copies in a row. The outcome has one entry more, in front, if `mate` takes part.
    """
    nodes = domain.stable.index.all(checksum)[1].astype(np.int64)
    room = limit - domain.stable.sharers[nodes].astype(np.int64)
    rounds, have = [], 0
    for used in range(limit):
        free = nodes[room > used]
        if have >= len(members) or not len(free):
            break
        rounds.append(free)
        have += len(free)
    places = np.concatenate(rounds)[: len(members)] if rounds else np.empty(0, np.int64)
    rest = np.concatenate([mate, members[len(places) :]])
    if len(places) == len(members):
        return places.astype(np.uint64)
    if len(rest) < 2:
        return np.append(places.astype(np.uint64), ALONE)
    copied = np.full(len(rest), ALONE)
    paired = len(rest) - (len(rest) % limit == 1)  # of one more than fills its copies there is nothing to share
    copied[:paired] = COPY + np.resize(rest[: -(-paired // limit)].astype(np.uint64), paired)
    goals: U64 = np.concatenate([copied[: len(mate)], places.astype(np.uint64), copied[len(mate) :]])
    return goals


def _with_mates(refs: U32, target: U64, mates: U32, mate_targets: U64) -> Matched:
    """Leave out pages that are alone, and insert mates where they belong among the others."""
    single = target == ALONE
    singles, refs, target = refs[single], refs[~single], target[~single]
    if len(mates):
        refs, target = np.concatenate([refs, mates]), np.concatenate([target, mate_targets])
        order = np.argsort(refs)
        refs, target = refs[order], target[order]
    return Matched(refs, target, singles, mates)
