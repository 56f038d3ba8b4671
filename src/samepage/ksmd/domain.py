"""A merge domain: everything ksmd knows of the processes that may share pages with one another.

Nothing here is reachable from another domain. That is how pages of different owners are kept from being
compared: not by a check that could be forgotten, but because there is nothing to compare them with.
"""

from __future__ import annotations

import contextlib
from collections import deque

import numpy as np

from samepage.arrays import Ints
from samepage.ksmd.age import Ages
from samepage.ksmd.deferred import Deferred
from samepage.ksmd.index import ChecksumIndex
from samepage.ksmd.mm_slot import MmSlot, Scope
from samepage.ksmd.patience import Patience
from samepage.ksmd.pieces import Pieces, Stretches
from samepage.ksmd.quota import Quota
from samepage.ksmd.refs import Refs
from samepage.ksmd.rmap import (
    HAS_CHECKSUM,
    HAS_NODE,
    IS_VOLATILE,
    SLICE_PAGES,
    VOLATILE,
    PageState,
    sorted_refs,
)
from samepage.ksmd.stable import StableTree
from samepage.memory import U32, U64
from samepage.process.merge_domain import MergeDomain

CANDIDATE = HAS_CHECKSUM.copy()
"""The states in which a page that was put aside as a candidate may still be when its turn comes."""
CANDIDATE[[PageState.UNSHARED, PageState.ALONE]] = False


class Domain(Refs):
    """The state of one merge domain: what its pages are, and which wait to be merged."""

    def __init__(
        self,
        key: MergeDomain,
        patience: Patience | None = None,
        is_foreign: bool = False,
        quota: Quota | None = None,
    ) -> None:
        super().__init__(quota or Quota())
        self.key = key
        self.patience = patience or Patience(most=30.0, regain=0.05)
        self.is_foreign = is_foreign
        """Whether the domain is of a user other than the service's owner."""
        self._begin()

    def _begin(self) -> None:
        """Nothing is known of any page."""
        self.stable = StableTree()
        self.unstable = ChecksumIndex(lambda: self.rmap.checksum)
        self.deferred = Deferred()
        self.parity = 0
        self.changed_now: list[U32] = []  # refs whose checksum was new in this pass,
        self.changed_before: list[U32] = []  # and in the one before: candidates at its end, if still the same
        self.named_now: list[U32] = []  # the same of those that were seen when only what was named was looked at
        self.named_before: list[U32] = []
        self.skipped: list[tuple[int, U32]] = []
        """Refs that changed and are not looked at, until the pass of that number."""
        self.candidates: deque[U32] = deque()  # to be matched, in parts

    def nbytes(self) -> int:
        """Bytes of memory all this takes, temporaries aside."""
        lists = [*self.changed_now, *self.changed_before, *self.named_now, *self.named_before]
        lists += [*self.candidates, *(refs for _, refs in self.skipped)]
        indexes = self.unstable.nbytes() + self.stable.nbytes() + self.deferred.nbytes()
        slots = sum(slot.areas.nbytes() + slot.counts.nbytes + slot.ages.nbytes() for slot in self.slots)
        return self.rmap.resident() + self._pieces_bytes + indexes + slots + sum(part.nbytes for part in lists)

    def release(self) -> None:
        """Give everything back, after the last of its processes has gone."""
        self.stable.release()
        super().release()

    def abandon(self) -> None:
        """Forget all that is known of its processes."""
        with contextlib.suppress(Exception):
            self.release()
        self._no_refs()
        self._begin()
        for slot in self.slots:
            slot.areas, slot.pieces, slot.ages = Stretches(), Pieces(), Ages()
            slot.counts[:] = 0
        self.recount()

    # -- what a page is ---------------------------------------------------------------------------------

    def set_state(self, slot: MmSlot, refs: U32 | Ints, state: PageState) -> None:
        """Give pages of one slot another state, and count them so."""
        if not len(refs):
            return
        slot.counts -= np.bincount(self.state[refs], minlength=len(slot.counts))
        slot.counts[state] += len(refs)
        self.state[refs] = state

    def set_states(self, refs: U32 | Ints, state: PageState) -> None:
        """The same for ascending refs of any slots."""
        for slot, at in self.cut(refs):
            self.set_state(slot, refs[at], state)

    def forget(self, slot: MmSlot, refs: Ints) -> None:
        """Forget pages that are gone."""
        self.withdraw(slot, refs)
        self.set_state(slot, refs, PageState.UNTOUCHED)

    def withdraw(self, slot: MmSlot, refs: Ints) -> int:
        """Take pages of one slot out of both trees, before they become something else.

        Returns how many of them were merged. The state is the caller's to change, at once.
        """
        state = self.state[refs]
        self.unstable.remove(refs[state == PageState.UNSHARED].astype(np.uint32))
        has_node = HAS_NODE[state]
        if has_node.any():
            self._bequeath(slot, refs[state == PageState.MERGED])
            self.stable.detach(self.checksum[refs[has_node]].astype(np.int64))
        return int(np.count_nonzero(has_node)) + int(np.count_nonzero(state == PageState.ZERO))

    def _bequeath(self, slot: MmSlot, refs: Ints) -> None:
        """If a page that leaves its node has heirs by fork, and no other page stands in for them, one of the heirs
        takes its place as the merged page. So of pages that would be one without us, exactly one counts as saved."""
        others = [s for s in self.slots if s is not slot]
        if not len(refs) or not any(s.counts[PageState.INHERITED] for s in others):
            return
        vpns, nodes = slot.pieces.vpns_of(refs), self.checksum[refs]
        for state in (PageState.MERGED, PageState.INHERITED):
            for other in others:
                if not other.counts[state]:
                    continue
                theirs = other.pieces.refs_of(vpns)
                at = np.flatnonzero(theirs >= 0)
                at = at[(self.state[theirs[at]] == state) & (self.checksum[theirs[at]] == nodes[at])]
                self.set_state(other, theirs[at], PageState.MERGED)
                vpns, nodes = np.delete(vpns, at), np.delete(nodes, at)

    def inherited(self, slot: MmSlot, vpns: Ints, nodes: Ints) -> Ints:
        """Which of the pages found in `slot` another process has at the same address, merged with the same node."""
        left = np.arange(len(vpns))  # those that nobody is known to have; the rest need not be looked up again
        for other in self.slots:
            if not len(left):
                break
            if other is slot or not other.merged:
                continue
            theirs = other.pieces.refs_of(vpns[left])
            refs = np.maximum(theirs, 0)
            has = (theirs >= 0) & HAS_NODE[self.state[refs]]
            has &= self.checksum[refs].astype(np.int64) == nodes[left]
            left = left[~has]
        return np.delete(np.arange(len(vpns)), left)

    def changed(self, slot: MmSlot, refs: Ints, checksums: U64) -> None:
        """Note that the content of pages (in neither tree) is new: they become candidates if it stays so for a whole
        pass."""
        self.checksum[refs] = checksums
        self.set_state(slot, refs, VOLATILE[self.parity])
        (self.named_now if slot.scope is Scope.NAMED else self.changed_now).append(refs.astype(np.uint32))

    # -- candidates -------------------------------------------------------------------------------------

    def end_pass(self, passes: int) -> None:
        """End a pass: pages that were new one pass ago and have not changed since become candidates, and so do deferred
        ones that are due."""
        self._keep_those_left_out()
        self.candidates.extend(self.changed_before + self.named_before)
        self.candidates.extend(self.deferred.due(passes))
        self._set_skipped_aside(passes)
        self.changed_before, self.changed_now = self.changed_now, []
        self.named_before, self.named_now = self.named_now, []
        self.parity ^= 1
        for slot in self.slots:
            self.sweep(slot)

    def turn_back(self) -> None:
        """Go back to the pass before; or, the second time, return to this one."""
        self.changed_now, self.changed_before = self.changed_before, self.changed_now
        self.named_now, self.named_before = self.named_before, self.named_now
        self.parity ^= 1

    def _keep_those_left_out(self) -> None:
        """Whether pages that were left out of the pass stayed the same is not known: they count as changed now."""
        if any(slot.is_left_out for slot in self.slots):
            self.changed_before, late = self._seen_again(self.changed_before, Scope.ALL)
            self.changed_now += late
            self.named_before, late = self._seen_again(self.named_before, Scope.NAMED)
            self.named_now += late

    def _seen_again(self, parts: list[U32], least: Scope) -> tuple[list[U32], list[U32]]:
        """Those of processes of which the pass looked at so much at least, and the rest."""
        seen, rest = [], []
        for part in parts:
            refs = np.sort(part[CANDIDATE[self.state[part]]])
            late = np.zeros(len(refs), np.bool_)
            for slot, at in self.by_slot(refs).items():
                late[at] = slot.scope < least
            late &= IS_VOLATILE[self.state[refs]]
            self.set_states(refs[late], VOLATILE[self.parity])
            seen.append(refs[~late])
            rest.append(refs[late])
        return seen, rest

    def _set_skipped_aside(self, passes: int) -> None:
        """Pages that changed in this pass and are not looked at in the next one wait for the look that shows whether
        they stayed the same; they then count as changed in the pass before that look."""
        if any(slot.ages.remaining for slot in self.slots):
            self.changed_now = self._without_skipped(self.changed_now, passes)
            self.named_now = self._without_skipped(self.named_now, passes)
        due = [refs for until, refs in self.skipped if until <= passes]
        if due:
            self.skipped = [entry for entry in self.skipped if entry[0] > passes]
            refs = sorted_refs(due)
            refs = refs[IS_VOLATILE[self.state[refs]]]
            self.set_states(refs, VOLATILE[self.parity])
            self.changed_now.append(refs)

    def _without_skipped(self, parts: list[U32], passes: int) -> list[U32]:
        looked_at = []
        for part in parts:
            refs = np.sort(part[IS_VOLATILE[self.state[part]]])
            skips = np.zeros(len(refs), np.uint8)
            for slot, at in self.by_slot(refs).items():
                skips[at] = slot.ages.remaining_skips(slot.pieces.vpns_of(refs[at].astype(np.int64)))
            for skip in np.flatnonzero(np.bincount(skips)).tolist():
                these = refs[skips == skip]
                if skip:
                    self.skipped.append((passes + skip, these))
                else:
                    looked_at.append(these)
        return looked_at

    def next_candidates(self) -> U32:
        """The next slice of candidates, ascending; empty when there are none left."""
        parts: list[U32] = []
        taken = 0
        while self.candidates and taken < SLICE_PAGES:
            part = self.candidates.popleft()
            if taken + len(part) > SLICE_PAGES:
                part, rest = part[: SLICE_PAGES - taken], part[SLICE_PAGES - taken :]
                self.candidates.appendleft(rest)
            # What changed in the pass just over has the other parity, and waits for one pass more.
            state = self.state[part]
            part = part[CANDIDATE[state] & (state != VOLATILE[self.parity ^ 1])]
            parts.append(part)
            taken += len(part)
        return sorted_refs(parts)

    def start_afresh(self) -> None:
        """Start again after everything was unmerged: only checksums are known, and every page is a candidate."""
        self.unstable.clear()
        self.deferred = Deferred()
        self.candidates.clear()
        self.changed_now, self.changed_before, self.skipped = [], [], []
        self.named_now, self.named_before = [], []
        for slot in self.slots:
            slot.ages, slot.aside = Ages(), []
            for _, refs in self.known(slot):
                refs = refs[HAS_CHECKSUM[self.state[refs]]]
                self.set_state(slot, refs, PageState.KNOWN)
                if len(refs):
                    self.changed_before.append(refs.astype(np.uint32))
