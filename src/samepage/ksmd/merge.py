"""Matching candidates, donating one copy of each, and merging (cmp_and_merge_page, stable_tree_search,
unstable_tree_search_insert, try_to_merge_with_ksm_page; but for a hundred thousand pages at once).

A slice of candidates is cut and copied in the order of memory, for runs of pages that stay runs in a segment cost one
mapping instead of thousands:

 1. pages of zeros are merged with the zero page, which costs neither mapping nor segment;
 2. `_match` gives every other page a *target*: a stable node, or the page (its *donor*) of which a copy is to be
    made; who has no partner goes to the unstable index;
 3. `_within_budget` drops the shortest extents where a process has not mappings enough;
 4. `_merge` has the donors' pages copied into segments, run by run, and merged with, first by the others, then, where
    that succeeded for anybody, by the donors themselves (`exchange`);
 5. and settles what came of it. A copy that nobody else turned out to equal (the donor's page was just being written,
    or checksums collided) is never used again: its donor is left alone, and the others are matched anew without it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from samepage.arrays import Bools, Ints, run_starts
from samepage.ksmd.deferred import COLLIDED_LONGEST, LONGEST
from samepage.ksmd.domain import Domain
from samepage.ksmd.exchange import COPY, UNASKED, Exchange, merge
from samepage.ksmd.index import by_checksum
from samepage.ksmd.mm_slot import MmSlot
from samepage.ksmd.rmap import PageState, sorted_refs
from samepage.ksmd.stable import SEGMENT_PAGES
from samepage.memory import EXTENT, U8, U32, U64, ZERO_PAGE, AddressSpaceSilent, PageStatus

Concurrently = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""Like `map`: the service gives that of a thread pool, so that processes work at the same time."""

ROUNDS = 3
"""Times a slice is matched anew for the sake of pages whose donor failed them; then they are deferred."""

ALONE = np.uint64((1 << 64) - 1)
"""Target of a page that has no partner."""


@dataclass(slots=True)
class _Failed:
    why: Exception


@dataclass(slots=True)
class MergeWork:
    """What merging needs to know besides the domain, and what it counts. One for the life of a ksmd."""

    concurrently: Concurrently
    max_page_sharing: int = 256
    use_zero_pages: bool = True
    smart_scan: bool = True
    """What failed is tried again after ever more passes; else after one."""
    allowance: dict[str, int] | None = None
    """Pages that may still be merged, by memory cgroup; None: no limit (max_overcommit)."""
    passes: int = 0
    wary: bool = False
    """A process is silent. There may be more (of a frozen cgroup, say): each is looked at before it is asked anything,
    for to find out by asking takes a tenth of a second."""
    ends: float = math.inf
    """When nothing more of this slice is asked of anybody, in `time.monotonic`: the rest is tried again."""
    statuses: Ints = field(default_factory=lambda: np.zeros(len(PageStatus), np.int64))

    def each(self, slots: Iterable[MmSlot], work: Callable[[MmSlot], Any]) -> dict[MmSlot, Any]:
        """Do something to several processes at the same time. Those that turn out to be gone are marked, and missing
        from the outcome. So are those for which `work` fails by a mistake of ksmd's own: the others are served on."""
        present = [slot for slot in slots if not slot.is_away]

        def attempt(slot: MmSlot) -> Any:
            try:
                if self.wary and (halted := slot.space.halted()):
                    raise AddressSpaceSilent(slot.pid, halted)
                return work(slot)
            except Exception as e:
                self.wary |= isinstance(e, AddressSpaceSilent)
                return _Failed(e)

        outcome = {}
        at_once = self.concurrently if len(present) > 1 else map  # one alone is not worth another thread
        for slot, result in zip(present, at_once(attempt, present), strict=True):
            if isinstance(result, _Failed):
                slot.lose(result.why)
            else:
                outcome[slot] = result
        return outcome


def merge_candidates(domain: Domain, refs: U32, work: MergeWork) -> None:
    """Merge what can be merged of a slice of candidates: ascending refs whose checksums are known, in no index."""
    refs = _without_the_silent(domain, refs)
    if work.use_zero_pages:
        refs = _merge_zero_pages(domain, refs, work)
    left: list[U32] = []
    for n in range(ROUNDS):
        if not len(refs):
            break
        matching = _Round(domain, refs, work, again=n > 0)
        refs = matching.run()
        left.extend(matching.left)
    _settle_left(domain, sorted_refs([*left, refs]), work)


def _without_the_silent(domain: Domain, refs: U32) -> U32:
    """Candidates of processes that do not answer are kept until they do."""
    if not any(slot.silent for slot in domain.slots):
        return refs
    keep = np.ones(len(refs), np.bool_)
    for slot, at in domain.by_slot(refs).items():
        if slot.silent:
            slot.aside.append(refs[at])
            keep[at] = False
    domain.set_states(refs[~keep], PageState.DEFERRED)
    return refs[keep]


def _defer(domain: Domain, refs: U32, work: MergeWork, state: PageState) -> None:
    domain.set_states(refs, state)
    domain.deferred.defer(refs, work.passes, LONGEST if work.smart_scan else 0)


def _collide(domain: Domain, refs: U32, work: MergeWork) -> None:
    """Pages compared different from others of equal checksum. Checksums of 64 bits hardly ever collide: somebody wrote
    in between, or did not tell the truth of a page, which must not keep honest ones from each other for ever."""
    domain.set_states(refs, PageState.COLLIDED)
    domain.deferred.defer(refs, work.passes, COLLIDED_LONGEST)


def _settle_left(domain: Domain, refs: U32, work: MergeWork) -> None:
    """Pages that found no donor that could give a copy, those that could not among them: mostly pages that a fork still
    shares. One of each content stands in the unstable index, as the first of them does in the kernel's tree, if nobody
    else stands there or in the stable one for it; the others are tried again, and with them that one, too."""
    if not len(refs):
        return
    sums, first = np.unique(domain.checksum[refs], return_index=True)
    alone = (domain.unstable.find(sums) < 0) & (domain.stable.index.find(sums) < 0)
    stays = np.zeros(len(refs), np.bool_)
    stays[first[alone]] = True
    _defer(domain, refs[~stays], work, PageState.DEFERRED)
    domain.set_states(refs[stays], PageState.UNSHARED)
    domain.unstable.insert(refs[stays])


def _merge_zero_pages(domain: Domain, refs: U32, work: MergeWork) -> U32:
    """Merge pages of zeros with the zero page; returns the others."""
    zero = np.zeros(len(refs), np.bool_)
    for slot, part in domain.cut(refs):
        zero[part] = domain.checksum[refs[part]] == np.uint64(slot.zero_checksum)
    if not zero.any():
        return refs
    may = _may_merge(domain, refs[zero], refs[zero].astype(np.uint64), work)
    _defer(domain, refs[zero][~may], work, PageState.DEFERRED)
    pages = refs[zero][may]
    status: U8 = np.full(len(pages), PageStatus.BUSY, np.uint8)  # of who cannot be asked
    by_memory = domain.by_memory(pages)
    work.each(by_memory, lambda slot: _be_zeros(slot, *by_memory[slot], status))
    work.statuses += np.bincount(status, minlength=len(PageStatus))
    domain.set_states(pages[status == PageStatus.DONE], PageState.ZERO)
    _settle_failures(domain, pages, status, work)
    _collide(domain, pages[status == PageStatus.DIFFERENT], work)
    return refs[~zero]


def _be_zeros(slot: MmSlot, pages: Ints, vpns: Ints, status: U8) -> None:
    """Runs in any thread."""
    starts = run_starts(vpns)
    extents = np.empty(len(starts), EXTENT)
    extents["vpn"], extents["npages"] = vpns[starts], np.diff(np.append(starts, len(vpns)))
    extents["offset"] = ZERO_PAGE
    slot.cpu_ns += merge(slot, None, extents, pages, status)


def _may_merge(domain: Domain, refs: U32, target: U64, work: MergeWork) -> Bools:
    """Which of ascending refs can be merged without more being promised to their memory cgroups than `max_overcommit`
    allows; those are taken off the allowance, which is made anew for each slice, whatever becomes of them. Pages of one
    target go in together, for one alone would have nobody to share with."""
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


def _settle_failures(domain: Domain, refs: U32, status: U8, work: MergeWork) -> None:
    """What becomes of pages that could not be merged; DONE and DIFFERENT are the caller's."""
    domain.set_states(refs[status == PageStatus.GONE], PageState.UNTOUCHED)
    domain.set_states(refs[status == PageStatus.REFUSED], PageState.ALONE)
    _defer(domain, refs[(status == PageStatus.BUSY) | (status == PageStatus.NOMEM)], work, PageState.DEFERRED)
    _defer(domain, refs[status == PageStatus.NOMAP], work, PageState.OVER_BUDGET)


class _Round:
    """One round of matching and merging. `refs` ascend; `target` has one entry a ref. `left`: see `_settle_left`."""

    def __init__(self, domain: Domain, refs: U32, work: MergeWork, again: bool) -> None:
        self.domain = domain
        self.work = work
        self.again = again
        self.refs = refs
        self.target: U64 = np.empty(0, np.uint64)
        self.by_memory: dict[MmSlot, tuple[Ints, Ints]] = {}  # as of `Domain`, of the refs that are merged
        self.left: list[U32] = []

    def run(self) -> U32:
        """Returns the refs that are to be matched anew."""
        self._match()
        if not len(self.refs):
            return self.refs
        return self._merge(self._within_budget())

    # -- 2. matching ------------------------------------------------------------------------------------

    def _match(self) -> None:
        """Give every page its target; put those without a partner into the unstable index and drop them here."""
        domain, refs = self.domain, self.refs
        in_memory = self._in_memory()
        order, in_order = by_checksum(domain.checksum[refs[in_memory]])
        order = in_memory[order]
        first = np.flatnonzero(np.concatenate(([True], in_order[1:] != in_order[:-1])))
        size = np.diff(np.append(first, len(refs)))
        key = in_order[first]
        del in_order

        node = domain.stable.index.find(key)
        mate = domain.unstable.find(key)
        lowest = refs[order[first]].astype(np.int64)  # of one checksum the order is that of processes
        highest = refs[order[first + size - 1]].astype(np.int64)
        donor = np.where(mate >= 0, mate, lowest)
        # Every other segment comes from another process, where there is one: donating and merging then keep both busy.
        turn = donor // SEGMENT_PAGES % 2 == 1
        donor[turn] = highest[turn]
        donor = donor.astype(np.uint64)
        goal = np.where(size + (mate >= 0) >= 2, COPY + donor, ALONE)
        many = size + (mate >= 0) > self.work.max_page_sharing
        stable = np.flatnonzero(node >= 0)
        goal[stable] = node[stable]
        room = self.work.max_page_sharing - domain.stable.sharers[node[stable]].astype(np.int64)
        many[stable] = room < size[stable]

        # A mate is matched with when its group needs a copy made; then it takes part like the others.
        group = np.empty(len(refs), np.int64)
        group[order] = np.repeat(np.arange(len(first)), size)
        target = goal[group]
        del group
        joins = (goal >= COPY) & (goal != ALONE) & (mate >= 0) & ~many
        mates, mate_targets = [mate[joins].astype(np.uint32)], [goal[joins]]
        for g in np.flatnonzero(many):
            members = order[first[g] : first[g] + size[g]]
            others = [int(mate[g])] if mate[g] >= 0 else []
            goals = self._share_out(int(key[g]), refs[members], others)
            target[members] = goals[len(goals) - len(members) :]
            if len(goals) > len(members):
                mates.append(np.array(others, np.uint32))
                mate_targets.append(goals[:1])
        self._take_part(np.concatenate(mates), np.concatenate(mate_targets), target)

    def _in_memory(self) -> Ints:
        """The positions of refs by process, and in the order of its memory: then neighbours have donors that are
        neighbours, whatever the order in which processes told of them."""
        by_memory = self.domain.by_memory(self.refs)
        return np.concatenate([by_memory[slot][0] for slot in sorted(by_memory, key=lambda slot: slot.number)])

    def _take_part(self, mates: U32, mate_targets: U64, target: U64) -> None:
        domain, refs = self.domain, self.refs
        single = target == ALONE
        singles = refs[single]
        if self.again:  # its partner failed it just now
            self.left.append(singles)
        else:
            domain.set_states(singles, PageState.UNSHARED)
        refs, target = refs[~single], target[~single]
        if len(mates):
            domain.unstable.remove(mates)
            refs, target = np.concatenate([refs, mates]), np.concatenate([target, mate_targets])
            order = np.argsort(refs)
            refs, target = refs[order], target[order]
        if not self.again:
            domain.unstable.insert(singles)
        self.refs, self.target = refs, target

    def _share_out(self, checksum: int, members: U32, mate: list[int]) -> U64:
        """Targets for pages of one content when one node is not enough: `max_page_sharing` to each.

        The pages go round over the nodes (or the copies to be made), so that of a long run of equal pages each
        stretch maps a stretch of copies in a row. The outcome has one entry more, in front, if `mate` takes part.
        """
        limit = self.work.max_page_sharing
        nodes = self.domain.stable.index.entries(checksum).astype(np.int64)
        room = limit - self.domain.stable.sharers[nodes].astype(np.int64)
        rounds, have = [], 0
        for used in range(limit):
            free = nodes[room > used]
            if have >= len(members) or not len(free):
                break
            rounds.append(free)
            have += len(free)
        places = np.concatenate(rounds)[: len(members)] if rounds else np.empty(0, np.int64)
        rest = np.concatenate([np.array(mate, np.uint32), members[len(places) :]])
        if len(places) == len(members):
            goals: U64 = places.astype(np.uint64)
        elif len(rest) < 2:
            goals = np.append(places.astype(np.uint64), ALONE)
        else:
            goals = self._copies(places.astype(np.uint64), rest, bool(mate))
        return goals

    def _copies(self, places: U64, rest: U32, with_mate: bool) -> U64:
        """The targets in `places`, and around them those of `rest`, for which copies are to be made."""
        limit = self.work.max_page_sharing
        paired = len(rest) - (len(rest) % limit == 1)  # of one more than fills its copies there is nothing to share
        copied = np.full(len(rest), ALONE)
        copied[:paired] = COPY + np.resize(rest[: -(-paired // limit)].astype(np.uint64), paired)
        first = int(with_mate)
        goals: U64 = np.concatenate([copied[:first], places, copied[first:]])
        return goals

    # -- 3. the budget of mappings ----------------------------------------------------------------------

    def _within_budget(self) -> U32:
        """Drop pages whose mappings no process can afford; returns the donors of what is left, ascending."""
        refs, target = self.refs, self.target
        to_copy = target >= COPY
        donors: U32 = refs[target == COPY + refs]
        by_memory = self.domain.by_memory(refs)
        keep = np.ones(len(refs), np.bool_)
        for slot, count in self.work.each(by_memory, _map_count).items():
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
        may = np.ones(len(refs), np.bool_)
        may[keep] = _may_merge(self.domain, refs[keep], target[keep], self.work)
        if keep.all() and may.all():
            self.by_memory = by_memory
            return donors
        keep &= may
        rank = np.searchsorted(donors, (target & np.uint64(0xFFFFFFFF)).astype(np.uint32))
        users = np.bincount(rank[to_copy & keep], minlength=len(donors) + 1)
        keep[to_copy] &= users[rank[to_copy]] >= 2  # one page alone would save nothing
        _defer(self.domain, refs[~keep & may], self.work, PageState.OVER_BUDGET)
        _defer(self.domain, refs[~may], self.work, PageState.DEFERRED)
        self.refs, self.target = refs[keep], target[keep]
        self.by_memory = self.domain.by_memory(self.refs)
        donors = donors[users[: len(donors)] >= 2]
        return donors

    # -- 4. and 5. donation and merging -----------------------------------------------------------------

    def _merge(self, donors: U32) -> U32:
        domain, refs, work = self.domain, self.refs, self.work
        stable = domain.stable
        exchange = Exchange(domain, refs, self.by_memory, self.target, donors, work.passes)
        exchange.run(work.each, lambda: time.monotonic() >= work.ends)
        rank, status, donor_status = exchange.rank, exchange.status, exchange.donor_status
        work.statuses += np.bincount(status[status != UNASKED], minlength=len(PageStatus))
        work.statuses += np.bincount(donor_status[donor_status != PageStatus.DONE], minlength=len(PageStatus))
        copied = self.target >= COPY
        node = self.target.astype(np.int64)
        node[copied] = exchange.node[rank[copied]]
        donating = self.target == COPY + refs

        # Pages whose donor has nothing to give are matched anew; not if memory is short, which it is for all.
        orphan = (node < 0) & ~donating
        no_memory = orphan.copy()
        no_memory[orphan] = donor_status[rank[orphan]] == PageStatus.NOMEM
        _defer(domain, refs[no_memory], work, PageState.DEFERRED)
        again = [refs[orphan & ~no_memory]]
        failed = np.flatnonzero(donating & (node < 0))
        busy = donor_status[rank[failed]] == PageStatus.BUSY
        self.left.append(refs[failed[busy]])
        _settle_failures(domain, refs[failed[~busy]], donor_status[rank[failed[~busy]]], work)

        others = np.flatnonzero(~donating & (node >= 0))
        self._merged(others, node, status)
        proven = ~copied[others] | (stable.sharers[node[others]] > 0)
        lied = status[others] == PageStatus.DIFFERENT
        _collide(domain, refs[others[lied & proven]], work)
        again.append(refs[others[lied & ~proven]])

        mine = np.flatnonzero(donating & (node >= 0))
        used = status[mine] != UNASKED
        disproven = np.zeros(len(donors), np.bool_)
        disproven[rank[others[lied & ~proven]]] = True
        useless = mine[~used]
        _collide(domain, refs[useless[disproven[rank[useless]]]], work)
        _defer(domain, refs[useless[~disproven[rank[useless]]]], work, PageState.DEFERRED)
        mine = mine[used]
        self._merged(mine, node, status)
        # The copy is what the others have; this page was written since it was made. Unless it is reported so,
        # it is of equal checksum, and left alone.
        _collide(domain, refs[mine[status[mine] == PageStatus.DIFFERENT]], work)
        new = exchange.node[exchange.node >= 0]
        stable.publish(new[stable.sharers[new] > 0].astype(np.uint32))
        stable.close_unused(exchange.segments)
        return sorted_refs(again)

    def _merged(self, at: Ints, node: Ints, status: U8) -> None:
        """Settle what became of the pages at these positions, all but those that were DIFFERENT."""
        domain, refs = self.domain, self.refs
        done = at[status[at] == PageStatus.DONE]
        if len(done):
            domain.stable.attach(node[done])
            domain.checksum[refs[done]] = node[done].astype(np.uint64)
            domain.set_states(refs[done], PageState.MERGED)
        _settle_failures(domain, refs[at], status[at], self.work)


def _map_count(slot: MmSlot) -> int:
    """How many mappings more the process may have."""
    with slot.waited_for():
        count = slot.space.map_count()
    return max(0, count[1] - count[0])
