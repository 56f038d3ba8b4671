"""Passes over all memory: the cursor goes from process to process, and each is asked what it has that is new
(scan_get_next_rmap_item; one batch is a ksm_do_scan).

The owner's processes come first. Those of other users then have as much time as the owner's took, so that guests do not
make the owner wait.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator

from samepage.ksmd.advisor import Advisor
from samepage.ksmd.domain import Domain
from samepage.ksmd.islands import restore
from samepage.ksmd.knobs import Knobs
from samepage.ksmd.look import Look, Seen, heard, ingest, look
from samepage.ksmd.merge_work import MergeWork
from samepage.ksmd.mm_list import MmList
from samepage.ksmd.mm_slot import MmSlot, Scope
from samepage.ksmd.motion import Motion
from samepage.ksmd.patience import A_MOMENT
from samepage.ksmd.unmerge import free_sparse_segments, retry_pending
from samepage.memory import AddressSpaceGone, AddressSpaceSilent, ScanFlag

ROUNDS, LOOKS = 16, 4
"""Steps in one batch at most, and looks at a process in a step. These are bounds, so that one process that makes no
progress cannot starve the rest."""

BATCH_SECONDS = 0.5
"""No step begins when a batch has taken this long: others wait for the mutex."""

STEP_PAGES = 256
"""The fewest pages a process is asked for, if the budget is larger: each message has its price."""

JOIN_SECONDS = 0.15
"""How long after a fork the child may take to join (its agent waits a third of that, because most children exec at
once). A pass in which ksmd saw the parent's fork does not end before that."""

FOREIGN_SECONDS = 0.05
"""How long a pass serves the processes of other users, or as long as the owner's own took if that is longer. Then the
pass ends, and the rest have their turn in the next one, so that their owner does not wait for them."""


class Passes:
    """The current pass, and the number of passes. Everything is touched under `Ksmd.mutex` only."""

    def __init__(
        self,
        mm_list: MmList,
        knobs: Knobs,
        advisor: Advisor,
        work: MergeWork,
        clock: Callable[[], float],
        cpu_clock: Callable[[], float],
    ) -> None:
        self.mm_list, self.knobs, self.advisor, self.work = mm_list, knobs, advisor, work
        self.clock, self.cpu_clock = clock, cpu_clock
        self.seqnr = 0
        self.pages_scanned = self.pages_skipped = 0
        self.found_work = False
        """Something changed in this pass, or was to be merged."""
        self._took = {False: 0.0, True: 0.0}  # seconds of this pass, by whether a foreign domain had them
        self._hashed = 0  # pages, in this pass
        self._joins_until = -math.inf  # until then the pass waits for forked children
        self._began = -math.inf  # of this pass
        self._pruned = -math.inf
        self._belated = False  # newcomers are looked at, and it is no pass

    # -- a batch ----------------------------------------------------------------------------------------

    def scan(self, budget: int) -> int:
        """One batch: let processes hash at most `budget` pages. Returns how many they hashed."""
        mm_list = self.mm_list
        if not mm_list.in_pass:
            self._begin()
            if not mm_list.cursor:  # nobody is there: that is no pass
                mm_list.in_pass = False
                return 0
        started = self.cpu_clock()
        scanned = list(mm_list.cursor)
        known = sum(slot.is_known for slot in scanned) / max(1, len(scanned))
        spent_before = sum(slot.cpu_ns for slot in scanned)
        self._put_off()
        with self._in_the_pass_before() if self._belated else contextlib.nullcontext():
            total = self._steps(budget)
        self.pages_scanned += total.hashed
        self._hashed += total.hashed
        self.found_work |= bool(total.changed)
        in_processes = sum(slot.cpu_ns for slot in scanned) - spent_before
        own = self.cpu_clock() - started
        cpu = own + in_processes / 1e9
        self.advisor.scanned(self.clock(), cpu, total.hashed, total.first_looks, total.broken, known, own)
        if not mm_list.cursor and self._belated:
            mm_list.in_pass = False
            self.advisor.newcomers_seen(self.clock())
        elif not mm_list.cursor and not self.waits_for_children():
            self._end()
        return total.hashed

    def _begin(self) -> None:
        mm_list, is_due = self.mm_list, self.advisor.is_due(self.clock())
        newcomers = [] if is_due else self._newcomers()
        self._belated = bool(newcomers)
        if newcomers:
            mm_list.cursor = {slot: mm_list.carried.pop(slot, 0) for slot in newcomers}
            mm_list.in_pass = True
            return
        taking_part = mm_list.for_a_pass()
        if not is_due and any(slot.is_left_out and not slot.passes for slot in taking_part):
            return  # they are why ksmd was called
        slots = [slot for slot in taking_part if self._is_due(slot)]
        if taking_part and not slots:
            self.advisor.pass_over(self.clock(), quiet=True)
        slots.sort(key=lambda slot: slot.passes > 0)  # the new ones first; they are not made to wait
        for slot in slots:
            if slot not in mm_list.carried:
                slot.ages.begin_pass(bool(self.knobs.smart_scan) and not slot.hash_all)
        mm_list.cursor = {slot: mm_list.carried.get(slot, 0) for slot in slots}
        mm_list.carried = {}
        mm_list.in_pass = True
        self._began = self.clock()
        self._took = {False: 0.0, True: 0.0}
        self._hashed = 0

    def _newcomers(self) -> list[MmSlot]:
        """Who was never looked at, and whose turn it is: they are looked at alone while looks at all are not due. So
        what a process costs that comes and goes does not grow with the number of the others. Of those that fill their
        memory, what was named is looked at ahead of the others only once."""
        slots = [slot for slot in self.mm_list.for_a_pass() if not slot.passes and not slot.is_put_off]
        slots = [slot for slot in slots if self._is_due(slot, may_glance=not slot.looks)]
        if self._others_had_their_turn():
            slots = [slot for slot in slots if not slot.domain.is_foreign]
        return slots

    @contextlib.contextmanager
    def _in_the_pass_before(self) -> Iterator[None]:
        """While this is in use, looks count as if the last pass were not over yet: pages that then stay the same for
        one whole pass become candidates at its end."""
        domains = self.mm_list.domains()
        for domain in domains:
            domain.turn_back()
        try:
            yield
        finally:
            for domain in domains:
                domain.turn_back()

    def _put_off(self) -> None:
        """Who is silent, or kept ksmd waiting for too long, is not asked in this pass, nor is a process that joined
        while it went on, if it is not due."""
        for slot in list(self.mm_list.cursor):
            is_new = slot.is_left_out and slot.motion is None
            if slot.is_put_off or (is_new and not self._is_due(slot)):
                del self.mm_list.cursor[slot]

    def _is_due(self, slot: MmSlot, may_glance: bool = True) -> bool:
        """Whether to look at a process in this pass. While it fills its memory, only what was named is looked at, if
        that may be."""
        stirring = None
        if self.knobs.advisor_mode == "cpu":
            stirring = slot.space.stirring()
        slot.scope = Scope.ALL
        if stirring is not None:
            now, cpu = self.clock(), stirring.cpu_seconds - slot.cpu_ns / 1e9
            slot.motion = slot.motion or Motion(now)
            if slot.motion.is_due(now, stirring.faults, stirring.pages, cpu, self.knobs.cpu_share):
                slot.motion.looked_at(now, stirring.faults)
            else:
                slot.scope = Scope.NAMED if may_glance and slot.motion.is_glance_due(now) else Scope.NOTHING
        return slot.scope is not Scope.NOTHING

    def _steps(self, budget: int) -> Seen:
        mm_list, total = self.mm_list, Seen()
        began = self.clock()
        for _ in range(ROUNDS):
            if not mm_list.cursor or total.hashed >= budget or self.clock() - began > BATCH_SECONDS:
                break
            own = [slot for slot in mm_list.cursor if not slot.domain.is_foreign]
            if not own and self._others_had_their_turn() and self._are_there_own():
                mm_list.carried, mm_list.cursor = mm_list.cursor, {}
                break
            before = self.clock()
            self._step(own or list(mm_list.cursor), budget - total.hashed, total)
            self.spent(self.clock() - before, is_foreign=not own)
        return total

    def _step(self, slots: list[MmSlot], budget: int, total: Seen) -> None:
        """Ask processes of the pass for one step, or as many as the budget is worth asking."""
        cursor = self.mm_list.cursor
        slots = slots[: max(1, budget // STEP_PAGES)]
        share = budget // len(slots)
        looks = self.work.each(slots, lambda slot: self._ask(slot, cursor[slot], share))
        for slot in slots:
            try:
                for seen in looks.get(slot, []):
                    self.take_in(slot, seen, total)
                    cursor[slot] = seen.reply.next_vpn
            except AddressSpaceGone as e:
                slot.lose(e)
            except Exception as e:  # whatever it said that ksmd cannot cope with, the others are looked at all the same
                slot.lose(e)
                self.mm_list.mend()
            if slot.is_away:
                del cursor[slot]
            elif not cursor[slot]:
                del cursor[slot]
                slot.looked_at()

    def _ask(self, slot: MmSlot, vpn: int, budget: int) -> list[Look]:
        """Several looks, without waiting for others in between. If areas changed, that look is the last: it must be
        taken in first. Runs in any thread."""
        looks: list[Look] = []
        named = ScanFlag.NAMED if slot.scope is Scope.NAMED else ScanFlag.NONE
        while len(looks) < LOOKS and budget > 0:
            first, end = slot.ages.ahead(vpn)
            try:
                looks.append(look(slot, first, budget, self.flags(slot) | named, end))
            except AddressSpaceSilent as e:
                slot.lose(e)
                self.work.wary = True
                break  # what it said before counts
            vpn, budget = looks[-1].reply.next_vpn, budget - len(looks[-1].reply.checksums)
            if not vpn or looks[-1].areas is not None or looks[-1].wall_ns > A_MOMENT * 1e9:
                break
        return looks

    def _end(self) -> None:
        self.mm_list.in_pass = False
        self.seqnr += not any(slot.is_left_out for slot in self.mm_list.slots())
        self.work.passes += 1
        candidates = sum(slot.with_checksum for slot in self.mm_list.slots())
        self.pages_skipped += max(0, candidates - self._hashed)
        prune = self.clock() - self._pruned >= self.knobs.stable_node_chains_prune_millisecs / 1000
        if prune:
            self._pruned = self.clock()
        for domain in self.mm_list.domains():
            self._end_of(domain, prune)
        # No page is looked at again before as much time as a pass takes has gone by, so that is part of the pause.
        self.advisor.pass_over(self._began if self.found_work else self.clock(), quiet=not self.found_work)
        self.found_work = False

    def _end_of(self, domain: Domain, prune: bool) -> None:
        passes = self.work.passes
        domain.end_pass(passes)
        for slot in [s for s in domain.slots if s.pending_breaks and not s.is_away]:
            try:
                retry_pending(domain, slot, passes)
            except AddressSpaceGone as e:
                slot.lose(e)
        self.found_work |= restore(domain, [s for s in domain.slots if not s.is_away], self.work)
        if prune:
            free_sparse_segments(domain, passes)

    # -- looks, also those of others --------------------------------------------------------------------

    def flags(self, slot: MmSlot) -> ScanFlag:
        """How to look at a process now."""
        if slot.hash_all or not self.knobs.smart_scan:
            flags = ScanFlag.ALL
        else:
            flags = ScanFlag.STILL if slot.is_still else ScanFlag.NONE
        return flags if self.knobs.merge_across_nodes else flags | ScanFlag.NODES

    def take_in(self, slot: MmSlot, seen: Look, total: Seen) -> None:
        """Take what a process said into the books. Raises AddressSpaceGone if it makes no sense."""
        with slot.waited_for():
            outcome = ingest(slot.domain, slot, seen, self.work.passes)
        if outcome.first_looks or outcome.turned:
            slot.expect(slot.unmerged)
        if seen.reply.forked < JOIN_SECONDS:
            self._joins_until = max(self._joins_until, self.clock() + JOIN_SECONDS - seen.reply.forked)
        total.hashed += outcome.hashed
        total.first_looks += outcome.first_looks
        total.changed += outcome.changed
        total.broken += outcome.broken
        slot.stirred |= bool(outcome.changed or outcome.turned)

    def catch_up(self, slot: MmSlot) -> None:
        """Take in what a silent process answered meanwhile, and see whether it is silent still."""
        silent, replies = slot.space.catch_up()
        slot.unheard += replies
        slot.silent = silent
        while slot.unheard and not slot.silent:
            seen = heard(slot, slot.unheard[0], time.perf_counter_ns())
            del slot.unheard[0]
            self.take_in(slot, seen, Seen())
        if not slot.silent:
            for refs in slot.aside:
                slot.domain.deferred.defer(refs, self.work.passes)
            slot.aside = []

    # -- whose turn it is -------------------------------------------------------------------------------

    def spent(self, seconds: float, is_foreign: bool) -> None:
        """Note how much time of this pass went to the owner's processes, or to those of others."""
        self._took[is_foreign] += seconds

    def is_turn_of_others(self) -> bool:
        """Whether foreign processes are served now: the owner's were all looked at in this pass, or in the last one if
        none is going on, for most passes begin and end within one batch."""
        if self._others_had_their_turn():
            return not self.mm_list.in_pass and not self._are_there_own()
        return all(slot.domain.is_foreign for slot in self.mm_list.cursor)

    def _others_had_their_turn(self) -> bool:
        return self._took[True] > max(FOREIGN_SECONDS, self._took[False])

    def _are_there_own(self) -> bool:
        return any(not slot.domain.is_foreign for slot in self.mm_list.slots())

    def waits_for_children(self) -> float:
        """How many seconds until the pass waits for no child of a fork any more; 0: it does not wait."""
        return max(0.0, self._joins_until - self.clock())
