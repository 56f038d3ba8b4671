"""The books of a merge domain: whether they agree with one another, and how to make them agree again.

What ksmd knows of a page stands in two columns (`rmap`), and everything else follows from these: how many pages of a
process are in which state, which refs stand in the unstable index, who uses a stable node. Every change is made to both
at once. If a defect of ksmd ends a change in the middle, `mend` computes the rest anew, and the next slice finds the
domain in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np

from samepage.arrays import Ints
from samepage.ksmd.deferred import Deferred
from samepage.ksmd.domain import CANDIDATE, Domain
from samepage.ksmd.mm_slot import MmSlot
from samepage.ksmd.pieces import NONE
from samepage.ksmd.rmap import HAS_CHECKSUM, HAS_NODE, PageState
from samepage.memory import VPN_END


def problems(domain: Domain) -> list[str]:
    """Describe what does not agree; empty if everything does. Looks at every page."""
    return [*_of_pieces(domain), *_of_slots(domain), *_of_unstable(domain), *_of_stable(domain)]


def _known(domain: Domain) -> Ints:
    """All refs with a known state, ascending."""
    whole = np.array([0]), np.array([domain.rmap.top])
    return np.concatenate([NONE, *domain.known_refs(*whole)])


def _ranges(domain: Domain) -> tuple[Ints, Ints]:
    """The refs of all pieces, as ranges in ascending order; they overlap if the books are wrong."""
    refs = [(NONE, NONE), *(slot.pieces.refs() for slot in domain.slots)]
    first, last = (np.concatenate(part) for part in zip(*refs, strict=True))
    order = np.argsort(first, kind="stable")
    return first[order], last[order]


def _of_pieces(domain: Domain) -> Iterator[str]:
    for slot in domain.slots:
        start, end, areas = slot.pieces.start, slot.pieces.end, slot.areas
        for first, past in ((start, end), (areas.start, areas.end)):
            if len(first) and (np.any(first >= past) or first[0] < 0 or past[-1] > VPN_END):
                yield f"{slot.pid}: impossible pieces or areas"
            if np.any(first[1:] < past[:-1]):
                yield f"{slot.pid}: pieces or areas overlap"
        if not areas.count(start, end) == slot.pieces.npages == int((end - start).sum()):
            yield f"{slot.pid}: pieces in no area"
        if not np.array_equal(slot.pieces.refs_of(slot.pieces.vpns_of(slot.pieces.base)), slot.pieces.base):
            yield f"{slot.pid}: refs of other pages"
    first, last = _ranges(domain)
    free_first, free_last = domain.rmap.free_ranges()
    top = domain.rmap.top
    starts, ends = (np.append(part, end) for part, end in ((first, top), (last, top)))
    taken = np.argsort(np.append(starts, free_first), kind="stable")
    starts, ends = np.append(starts, free_first)[taken], np.append(ends, free_last)[taken]
    if not np.array_equal(np.append(0, ends[:-1]), starts):
        yield "refs that are nobody's, or two's"
    if any(True for _ in domain.known_refs(free_first, free_last - free_first)):
        yield "free refs are in use"
    if domain.rmap.state[top:].any():
        yield "refs from the end on are in use"
    yield from domain.held_wrong()


def _of_slots(domain: Domain) -> Iterator[str]:
    for slot in domain.slots:
        if not np.array_equal(slot.counts[1:], _count(domain, slot)[1:]):
            yield f"{slot.pid}: its pages are counted wrong"


def _count(domain: Domain, slot: MmSlot) -> Ints:
    counts = np.zeros(len(PageState), np.int64)
    for _, refs in domain.known(slot):
        counts += np.bincount(domain.state[refs], minlength=len(counts))
    return counts


def _of_unstable(domain: Domain) -> Iterator[str]:
    if not domain.unstable.in_order():
        yield "the unstable index is out of order"
    known = _known(domain)
    if not np.array_equal(domain.unstable.numbers(), known[domain.state[known] == PageState.UNSHARED]):
        yield "the unstable index holds other pages than those that are to be in it"


def _of_stable(domain: Domain) -> Iterator[str]:
    stable = domain.stable
    known = _known(domain)
    refs = known[HAS_NODE[domain.state[known]]]
    nodes = domain.checksum[refs].astype(np.int64)
    if not stable.owns(nodes).all():
        yield "pages are merged with nodes of no segment"
        return
    counted = np.bincount(nodes, minlength=len(stable.sharers))
    if not np.array_equal(counted, stable.sharers):
        yield "sharers of nodes are counted wrong"
    yield from stable.problems()
    if not stable.index.in_order():
        yield "the stable index is out of order"


def mend(domain: Domain) -> None:
    """Make the books agree, if they do not. If that is impossible, forget the domain: its processes are cut off, and an
    honest one joins again, merged as it is."""
    try:
        if problems(domain):
            _rebuild(domain)
            if left := problems(domain):
                raise AssertionError(left)
    except Exception as e:
        for slot in domain.slots:
            slot.lose(e)
        domain.abandon()
    for slot in domain.slots:
        slot.areas_seq = None  # what it said last may not have been taken in


def _rebuild(domain: Domain) -> None:
    """Compute everything anew that follows from the state of the pages. Pages that could be merged become candidates
    again. A page merged with a node that is in no segment counts as not merged any more, and is left alone until it is
    written."""
    first, last = _ranges(domain)
    domain.rmap.keep_only(first, last - first)
    domain.recount()
    known = _known(domain)
    state = domain.state[known]
    refs = known[HAS_NODE[state]]
    lost = refs[~domain.stable.owns(domain.checksum[refs].astype(np.int64))]
    domain.state[lost] = PageState.BROKEN
    refs = known[HAS_NODE[domain.state[known]]]
    room = domain.stable.rebuild(domain.checksum[refs].astype(np.int64))
    domain.state[refs[~room]] = PageState.BROKEN
    state = domain.state[known]
    domain.unstable.clear()
    domain.unstable.insert(known[state == PageState.UNSHARED].astype(np.uint32))
    domain.deferred = Deferred()
    domain.candidates = deque()
    domain.changed_now, domain.named_now, domain.named_before, domain.skipped = [], [], [], []
    domain.changed_before = [known[CANDIDATE[state] & HAS_CHECKSUM[state]].astype(np.uint32)]
    for slot in domain.slots:
        slot.counts[:] = _count(domain, slot)
