"""Merging candidates a slice at a time, and what is checked before each slice."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from samepage.ksmd.domain import Domain
from samepage.ksmd.merge import merge_candidates
from samepage.ksmd.mm_slot import MmSlot
from samepage.ksmd.passes import Passes
from samepage.ksmd.rmap import SLICE_PAGES
from samepage.ksmd.stable import SEGMENT_PAGES
from samepage.memory import PAGE_SIZE, U32, PageStatus

SEGMENTS_A_SLICE = 2 * SLICE_PAGES // SEGMENT_PAGES
"""More new segments than a slice of candidates comes to."""

FOREIGN_SLICE_SECONDS = 1.0
"""How long a slice of other users' pages is merged at most, however many answers that takes. A user with a few pages in
each of very many segments could make every answer late and none of them very late."""


class Slices:
    """Merges slices of candidates. `verify` drops the processes of a domain that are not who they were, or not where
    they belong. Everything is touched under `Ksmd.mutex` only."""

    def __init__(self, passes: Passes, verify: Callable[[Domain], None]) -> None:
        self._passes, self._mm_list, self._knobs = passes, passes.mm_list, passes.knobs
        self._advisor, self._work = passes.advisor, passes.work
        self._clock, self._cpu_clock = passes.clock, passes.cpu_clock
        self._verify = verify
        self.segments_max = math.inf
        """How many segments may be held at a time, to be handed out."""
        self.segments_retired = 0
        """How many segments were given up for that."""

    def merge_next(self) -> int | None:
        """Merge the next slice of the candidates that a pass left. Returns how many there were; None: none are left,
        or it is not their turn."""
        for domain in sorted(self._mm_list.domains(), key=lambda domain: domain.is_foreign):
            if domain.is_foreign and not self._passes.is_turn_of_others():
                return None
            if domain.candidates and not domain.patience.is_spent:
                began = self._clock()
                self.prepare(domain)
                if not domain.slots:  # they all went: there is no such domain any more
                    continue
                n = self._merge_next_of(domain)
                self._passes.spent(self._clock() - began, domain.is_foreign)
                return n
        return None

    def _merge_next_of(self, domain: Domain) -> int:
        work = self._work
        refs = domain.next_candidates()
        self._passes.found_work |= bool(len(refs))
        started, merged = self._cpu_clock(), work.statuses[PageStatus.DONE]
        try:
            self.merge(domain, refs)
        except Exception:
            domain.deferred.defer(refs, work.passes)
            raise
        if work.statuses[PageStatus.DONE] == merged:
            self._advisor.spent_in_vain(self._clock(), self._cpu_clock() - started)
        return len(refs)

    def prepare(self, domain: Domain) -> None:
        """Call this before candidates of a domain are taken in hand: processes may have to be forgotten."""
        self._keep_room_for_segments()
        self._verify(domain)

    def merge(self, domain: Domain, refs: U32) -> None:
        """Merge what can be merged of one slice (see `merge_candidates`)."""
        self._work.ends = time.monotonic() + FOREIGN_SLICE_SECONDS if domain.is_foreign else math.inf
        self._work.allowance = self._allowance()
        merge_candidates(domain, refs, self._work)

    def _keep_room_for_segments(self) -> None:
        """The service holds a descriptor of each segment for as long as it may be handed out. When descriptors run
        short, the oldest segments are retired, of the domain that has most, so that merging goes on."""
        domains = [domain for domain in self._mm_list.domains() if domain.stable.segments]
        if sum(len(domain.stable.segments) for domain in domains) <= self.segments_max - SEGMENTS_A_SLICE:
            return
        held = {domain: [s for s in domain.stable.segments if s.handle is not None] for domain in domains}
        over = sum(map(len, held.values())) - max(self.segments_max - SEGMENTS_A_SLICE, self.segments_max / 2)
        for segments in held.values():
            segments.sort(key=lambda s: s.born, reverse=True)
        while over > 0:
            domain = max(held, key=lambda domain: len(held[domain]))
            domain.stable.retire(held[domain].pop())
            self.segments_retired += 1
            over -= 1

    def _allowance(self) -> dict[str, int] | None:
        """How many pages may be merged in each memory cgroup by `max_overcommit`, as things stand; None: any number."""
        percent = self._knobs.max_overcommit
        if not percent:
            return None
        committed: dict[str, int] = {}
        available: dict[str, int] = {}
        for slot in self._mm_list.slots():
            if slot.silent:
                committed[slot.group] = committed.get(slot.group, 0) + slot.merged
        for slot, (group, there) in self._work.each(self._mm_list.slots(), headroom).items():
            slot.group = group
            committed[group] = committed.get(group, 0) + slot.merged
            available[group] = min(available.get(group, there), there)
        return {group: available[group] * percent // 100 // PAGE_SIZE - committed[group] for group in available}


def headroom(slot: MmSlot) -> tuple[str, int]:
    """The memory cgroup of a process and the bytes available there, as it says now. AddressSpaceGone."""
    with slot.waited_for():
        return slot.space.headroom()
