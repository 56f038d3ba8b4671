"""Merging candidates (cmp_and_merge_page, try_to_merge_with_ksm_page; but for a hundred thousand pages at once).

A slice of candidates is cut and copied in the order of memory, for runs of pages that stay runs in a segment cost one
mapping instead of thousands:

 1. pages of zeros are merged with the zero page, which costs neither mapping nor segment;
 2. `match` gives every other page a *target*: a stable node, or the page (its *donor*) of which a copy is to be
    made; a page without a partner goes to the unstable index;
 3. `budget` drops the shortest extents where a process has not mappings enough;
 4. `exchange` has the donors' pages copied into segments, run by run, and merged with, first by the others, then, where
    that succeeded for anybody, by the donors themselves;
 5. and `_Outcome` settles what came of it. A copy that nobody else turned out to equal (the donor's page was just being
    written, or checksums collided) is never used again: its donor is left alone, and the others are matched anew
    without it.
"""

from __future__ import annotations

import time

import numpy as np

from samepage.arrays import Ints, run_starts
from samepage.ksmd import settle
from samepage.ksmd.budget import may_merge, within_budget
from samepage.ksmd.domain import Domain
from samepage.ksmd.exchange import COPY, UNASKED, Exchange, merge
from samepage.ksmd.match import Matched, match
from samepage.ksmd.merge_work import MergeWork
from samepage.ksmd.mm_slot import MmSlot
from samepage.ksmd.rmap import PageState, sorted_refs
from samepage.memory import EXTENT, U8, U32, U64, ZERO_PAGE, PageStatus

ROUNDS = 3
"""How often a slice is matched for pages whose donor failed; then they are deferred."""


def merge_candidates(domain: Domain, refs: U32, work: MergeWork) -> None:
    """Merge what can be merged of a slice of candidates: ascending refs whose checksums are known, in no index."""
    refs = _without_the_silent(domain, refs)
    if work.use_zero_pages or domain.key.zero_only:
        refs = _merge_zero_pages(domain, refs, work)
    if domain.key.zero_only:
        domain.set_states(refs, PageState.ALONE)
        return
    without_donor: list[U32] = []
    for n in range(ROUNDS):
        if not len(refs):
            break
        matched = match(domain, refs, work.max_page_sharing)
        _to_the_indexes(domain, matched, without_donor if n > 0 else None)
        refs = _merge_matched(domain, matched, work, without_donor)
    settle.without_donor(domain, sorted_refs([*without_donor, refs]), work)


def _without_the_silent(domain: Domain, refs: U32) -> U32:
    """Keep candidates of processes that do not answer until they do."""
    if not any(slot.silent for slot in domain.slots):
        return refs
    keep = np.ones(len(refs), np.bool_)
    for slot, at in domain.by_slot(refs).items():
        if slot.silent:
            slot.aside.append(refs[at])
            keep[at] = False
    domain.set_states(refs[~keep], PageState.DEFERRED)
    return refs[keep]


def _merge_zero_pages(domain: Domain, refs: U32, work: MergeWork) -> U32:
    """Merge pages of zeros with the zero page; returns the others."""
    zero = np.zeros(len(refs), np.bool_)
    for slot, part in domain.cut(refs):
        zero[part] = domain.checksum[refs[part]] == np.uint64(slot.zero_checksum)
    if not zero.any():
        return refs
    may = may_merge(domain, refs[zero], refs[zero].astype(np.uint64), work)
    settle.defer(domain, refs[zero][~may], work)
    pages = refs[zero][may]
    status: U8 = np.full(len(pages), PageStatus.BUSY, np.uint8)  # of processes that cannot be asked
    by_memory = domain.by_memory(pages)
    work.each(by_memory, lambda slot: _be_zeros(slot, *by_memory[slot], status))
    work.statuses += np.bincount(status, minlength=len(PageStatus))
    domain.set_states(pages[status == PageStatus.DONE], PageState.ZERO)
    settle.failures(domain, pages, status, work)
    settle.collide(domain, pages[status == PageStatus.DIFFERENT], work)
    return refs[~zero]


def _be_zeros(slot: MmSlot, pages: Ints, vpns: Ints, status: U8) -> None:
    """Runs in any thread."""
    starts = run_starts(vpns)
    extents = np.empty(len(starts), EXTENT)
    extents["vpn"], extents["npages"] = vpns[starts], np.diff(np.append(starts, len(vpns)))
    extents["offset"] = ZERO_PAGE
    slot.cpu_ns += merge(slot, None, extents, pages, status)


def _to_the_indexes(domain: Domain, matched: Matched, failed: list[U32] | None) -> None:
    """Pages that have no partner go into the unstable index, those that have one now leave it. In a later round a
    partner failed the former just now: they are added to `failed` instead."""
    if failed is None:
        domain.set_states(matched.singles, PageState.UNSHARED)
    else:
        failed.append(matched.singles)
    if len(matched.mates):
        domain.unstable.remove(matched.mates)
    if failed is None:
        domain.unstable.insert(matched.singles)


def _merge_matched(domain: Domain, matched: Matched, work: MergeWork, without_donor: list[U32]) -> U32:
    """Have pages merged with their targets, as far as processes can afford it. Returns the refs that are to be matched
    anew; donors that had nothing to give are added to `without_donor`."""
    if not len(matched.refs):
        return matched.refs
    keep, donors = within_budget(domain, matched.refs, matched.target, work)
    refs, target = matched.refs[keep], matched.target[keep]
    exchange = Exchange(domain, refs, target, donors, work.passes)
    exchange.run(work.each, lambda: time.monotonic() >= work.ends)
    work.statuses += exchange.counts()
    outcome = _Outcome(domain, refs, target, exchange, work)
    again = [outcome.settle_those_without_copy(without_donor), outcome.settle_sharers()]
    outcome.settle_donors()
    new = exchange.new_nodes()
    domain.stable.publish(new[domain.stable.sharers[new] > 0].astype(np.uint32))
    domain.stable.close_unused(exchange.segments)
    return sorted_refs(again)


class _Outcome:
    """The outcome of merging. Pages have only one numbering: their position in `refs`. `node` is what a page was to be
    merged with; -1: there is no copy of its donor."""

    def __init__(self, domain: Domain, refs: U32, target: U64, exchange: Exchange, work: MergeWork) -> None:
        self._domain, self._refs, self._exchange, self._work = domain, refs, exchange, work
        self._target, self._status = target, exchange.status
        self._copied = target >= COPY
        self._donating = target == COPY + refs
        self._node = target.astype(np.int64)
        self._node[self._copied] = exchange.node_of(np.flatnonzero(self._copied))
        self._disproven: U32 = np.empty(0, np.uint32)
        """Donors of whose page there is a copy that nobody else turned out to equal."""

    def settle_those_without_copy(self, without_donor: list[U32]) -> U32:
        """Pages whose donor has nothing to give, and those donors. Returns the former, which are matched anew; but not
        if memory is short, which it is for all."""
        there_is_none = self._node < 0
        orphans = np.flatnonzero(there_is_none & ~self._donating)
        no_memory = self._exchange.donation_of(orphans) == PageStatus.NOMEM
        settle.defer(self._domain, self._refs[orphans[no_memory]], self._work)
        donors = np.flatnonzero(there_is_none & self._donating)
        status = self._exchange.donation_of(donors)
        busy = status == PageStatus.BUSY
        without_donor.append(self._refs[donors[busy]])
        settle.failures(self._domain, self._refs[donors[~busy]], status[~busy], self._work)
        again: U32 = self._refs[orphans[~no_memory]]
        return again

    def settle_sharers(self) -> U32:
        """Pages that were to be merged with a node, or with a copy of another page. Returns those that are matched
        anew: they differed from a copy that nobody else equals, so that it is not known which of the two is to
        blame."""
        at = np.flatnonzero(~self._donating & (self._node >= 0))
        self._settle(at)
        different = at[self._status[at] == PageStatus.DIFFERENT]
        self._unpublish_unused(self._node[different[~self._copied[different]]])
        proven = ~self._copied[different] | (self._domain.stable.sharers[self._node[different]] > 0)
        settle.collide(self._domain, self._refs[different[proven]], self._work)
        unproven = different[~proven]
        again: U32 = self._refs[unproven]
        self._disproven = (self._target[unproven] - COPY).astype(np.uint32)
        return again

    def _unpublish_unused(self, nodes: Ints) -> None:
        """Pages were not equal to these nodes, by whose checksum they had found them. Where nobody uses a node, nobody
        is to find it again: whoever made it may have lied, and left."""
        unused = nodes[self._domain.stable.sharers[nodes] == 0]
        self._domain.stable.unpublish(sorted_refs([unused.astype(np.uint32)]))

    def settle_donors(self) -> None:
        """Settle donors of which there are copies. Call it after all others."""
        at = np.flatnonzero(self._donating & (self._node >= 0))
        useless = at[self._status[at] == UNASKED]
        disproven = np.isin(self._refs[useless], self._disproven)
        settle.collide(self._domain, self._refs[useless[disproven]], self._work)
        settle.defer(self._domain, self._refs[useless[~disproven]], self._work)
        at = at[self._status[at] != UNASKED]
        self._settle(at)
        # The copy is what the others have; this page was written since it was made. Unless it is reported so,
        # it is of equal checksum, and left alone.
        settle.collide(self._domain, self._refs[at[self._status[at] == PageStatus.DIFFERENT]], self._work)

    def _settle(self, at: Ints) -> None:
        """Settle all pages except those that were DIFFERENT."""
        done = at[self._status[at] == PageStatus.DONE]
        if len(done):
            refs, nodes = self._refs[done], self._node[done]
            self._domain.stable.attach(nodes)
            self._domain.checksum[refs] = nodes.astype(np.uint64)
            self._domain.set_states(refs, PageState.MERGED)
        settle.failures(self._domain, self._refs[at], self._status[at], self._work)
