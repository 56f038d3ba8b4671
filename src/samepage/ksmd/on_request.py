"""Merging on request: a process says that a range of its pages will not change, and wants it merged now."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from samepage.arrays import Ints
from samepage.ksmd import counters as show
from samepage.ksmd.domain import Domain
from samepage.ksmd.islands import restore_range
from samepage.ksmd.knobs import error
from samepage.ksmd.look import Seen, look
from samepage.ksmd.mm_slot import MmSlot
from samepage.ksmd.passes import Passes
from samepage.ksmd.pieces import NONE
from samepage.ksmd.rmap import HAS_CHECKSUM, IS_MERGED, SLICE_PAGES, PageState, sorted_refs
from samepage.ksmd.slices import Slices
from samepage.memory import AddressSpaceGone

LOOK_RATE = 1 << 14
"""The slowest rate, in pages a second, at which a process may tell its checksums (64 MiB) without being charged for it:
nobody else is looked at meanwhile."""


@dataclass(slots=True, frozen=True)
class MergeOutcome:
    """What `Ksmd.merge_range` did. `pages_merged` of the range are merged now, `pages_new` of them by this call;
    `failures` are counted by name of `PageStatus` over all pages it touched."""

    pages_merged: int
    pages_new: int
    failures: dict[str, int]


class MergeRequests:
    """Merges ranges. Everything is touched under `Ksmd.mutex` only."""

    def __init__(self, passes: Passes, slices: Slices) -> None:
        self._passes, self._slices, self._work, self._clock = passes, slices, passes.work, passes.clock

    def merge(self, slot: MmSlot, vpn: int, npages: int) -> MergeOutcome:
        """See `Ksmd.merge_range`."""
        domain = slot.domain
        with self._charged(domain):
            self._look(slot, vpn, npages)
            self._slices.prepare(domain)
            if slot.gone:
                raise AddressSpaceGone(slot.lost)
            if restore_range(domain, slot, vpn, npages):
                self._look(slot, vpn, npages)
            before = self._work.statuses.copy()
            refs = np.concatenate([NONE, *(refs for _, refs in domain.known(slot, vpn, npages))])
            merged = _merged_of(domain, refs)
            self._merge(domain, refs)
            if slot.gone:
                raise AddressSpaceGone("gone while it was merged")
            now = _merged_of(domain, refs)
            return MergeOutcome(now, now - merged, show.failures((self._work.statuses - before).tolist()))

    def _merge(self, domain: Domain, refs: Ints) -> None:
        state = domain.state[refs]
        refs = refs[HAS_CHECKSUM[state] & (state != PageState.UNSHARED) & (state != PageState.COLLIDED)]
        for part in np.array_split(refs, 1 + len(refs) // SLICE_PAGES):
            self._refuse_guests_that_kept_others_waiting(domain)
            self._slices.merge(domain, sorted_refs([part.astype(np.uint32)]))

    def _look(self, slot: MmSlot, vpn: int, npages: int) -> None:
        at, total = vpn, Seen()
        try:
            while at < vpn + npages:
                if slot.gone:
                    raise AddressSpaceGone("has left")
                self._refuse_guests_that_kept_others_waiting(slot.domain)
                began = self._clock()
                seen = look(slot, at, vpn + npages - at, self._passes.flags(slot))
                self._passes.take_in(slot, seen, total)
                slot.kept_waiting(self._clock() - began - len(seen.reply.checksums) / LOOK_RATE)
                if not seen.reply.next_vpn:
                    break
                at = seen.reply.next_vpn
        except AddressSpaceGone as e:
            slot.lose(e)
            raise
        finally:
            self._passes.pages_scanned += total.hashed

    @contextlib.contextmanager
    def _charged(self, domain: Domain) -> Iterator[None]:
        """Charge what processes of other users ask for to their user's account, all of it."""
        began = self._clock()
        try:
            yield
        finally:
            if domain.is_foreign:
                domain.patience.spend(self._clock() - began)

    def _refuse_guests_that_kept_others_waiting(self, domain: Domain) -> None:
        if domain.is_foreign and domain.patience.is_spent:
            raise error(errno.EBUSY, "others were kept waiting for too long")


def _merged_of(domain: Domain, refs: Ints) -> int:
    return int(np.count_nonzero(IS_MERGED[domain.state[refs]]))
