"""The daemon itself: the list of processes, the scan cursor, run control, and what others may ask of it."""

from __future__ import annotations

import contextlib
import errno
import math
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np

from samepage.arrays import Bools, Ints
from samepage.ksmd import books
from samepage.ksmd import counters as show
from samepage.ksmd import knobs as knob_rules
from samepage.ksmd.advisor import Advisor
from samepage.ksmd.counters import Counters, ProcessRow, Snapshot
from samepage.ksmd.domain import Domain
from samepage.ksmd.islands import restore, restore_range
from samepage.ksmd.knobs import Knobs, Run
from samepage.ksmd.lost import Lost
from samepage.ksmd.merge import Concurrently, MergeWork, merge_candidates
from samepage.ksmd.mm_slot import MmSlot, Owed
from samepage.ksmd.patience import A_MOMENT, Accounts
from samepage.ksmd.pieces import NONE
from samepage.ksmd.quota import Quotas
from samepage.ksmd.rmap import HAS_CHECKSUM, IS_MERGED, SLICE_PAGES, PageState, sorted_refs
from samepage.ksmd.scan import Look, Seen, heard, ingest, look, recount_zeros
from samepage.ksmd.stable import SEGMENT_PAGES
from samepage.ksmd.unmerge import Cancelled, ProcessBreak, UnmergeResult, move_out, retry_pending, unmerge_pages
from samepage.memory import (
    PAGE_SIZE,
    AddressSpace,
    AddressSpaceGone,
    AddressSpaceSilent,
    PageStatus,
    ScanFlag,
)
from samepage.memory.identity import user_of

ROUNDS, LOOKS = 16, 4
"""Steps of a scan in one batch at most, and looks at a process in a step: one that never gets on must not keep ksmd
from the others."""

BATCH_SECONDS = 0.5
"""A batch ends after so long, if it did not before: others want the mutex."""

STEP_PAGES = 256
"""A process is not asked for fewer pages than these if the budget is larger: a message has its price."""

SPARSE_SHARE, SPARSE_PASSES, SPARSE_PAGES = 0.25, 8, 256
"""When less than this share of a segment's pages is in use after so many passes, and at least so many pages
(1 MiB) are held for nothing in such segments, their last users are moved out. Looked for every
`stable_node_chains_prune_millisecs`."""

JOIN_SECONDS = 0.15
"""A child may take so long after the fork to join (its agent waits a third of that, for most children exec at once); a
pass in which the parent was seen to have forked does not end before."""

SEGMENTS_A_SLICE = 2 * SLICE_PAGES // SEGMENT_PAGES
"""New segments that a slice of candidates comes to, and more."""

VERIFY_SECONDS = 1.0
"""Who a process is is looked at before pages are matched, but not more often than that: 50 microseconds."""

LISTEN_EVERY = 0.2
"""Seconds between two questions whether a process that is to be unmerged answers again."""

FOREIGN_SECONDS = 0.05
"""So long, or as long as the owner's own processes took, those of other users are looked at in a pass, and their pages
merged. Then the pass ends without the rest, which has its turn in the next: their owner waits no longer for them."""

FOREIGN_SLICE_SECONDS = 1.0
"""So long a slice of other users' pages is merged at most, however many answers that takes: who has few pages in each
of very many segments need be late with none of them."""

LOOK_RATE = 1 << 14
"""Pages a second, at worst, of which a process tells the checksums (64 MiB) while it is merged on request: nobody else
is looked at meanwhile, so whatever takes longer is taken off its account."""

WHOLE = (0, 1 << 52)
"""All pages an address space can have: (vpn, npages)."""


@dataclass(slots=True, frozen=True)
class MergeOutcome:
    """What `Ksmd.merge_range` did. `pages_merged` of the range are merged now, `pages_new` of them by this call;
    `failures` are counted by name of `PageStatus` over all pages it touched."""

    pages_merged: int
    pages_new: int
    failures: dict[str, int]


class Ksmd:
    """Finds equal pages in address spaces, and has them share one copy.

    Any thread may call any method. One works at a time, under `mutex` (ksm_thread_mutex); `enter`, `exit`,
    `counters`, `rows`, `get`, `next_wait` and `metadata_bytes` never wait for it.

    `concurrently` is used like `map` to have several processes work at once. `clock` and `cpu_clock` give seconds:
    of the time, and of this thread's CPU time. `owner` is the user whose processes come before those of others; None:
    there are no others.
    """

    def __init__(
        self,
        *,
        concurrently: Concurrently = map,
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.thread_time,
        owner: int | None = None,
    ) -> None:
        self.mutex = threading.Lock()
        self._clock, self._cpu_clock = clock, cpu_clock
        self.segments_max = math.inf
        """How many segments may be held at a time, to be handed out."""
        self.segments_retired = 0
        """How many were given up for that."""
        self._knobs = Knobs()
        self._advisor = Advisor(self._knobs)
        self._work = MergeWork(concurrently)
        self._accounts = Accounts(owner)
        self._quotas = Quotas(owner)
        self._domains: dict[int, Domain] = {}
        self._mmlist_lock = threading.Lock()  # guards the next three, and is held for moments only
        self._slots: dict[int, MmSlot] = {}  # by number, ascending: the list of ksm_mm_head
        self._joining: list[MmSlot] = []
        self._next_number = 1
        self._cursor: dict[MmSlot, int] = {}  # slots of this pass not yet looked at to the end, and where to go on
        self._carried: dict[MmSlot, int] = {}  # where to go on in the next pass with those that had no turn
        self._took = {False: 0.0, True: 0.0}  # seconds of this pass, by whether they were for foreign domains
        self._in_pass = False
        self._lost = Lost()
        self._joins_until = -math.inf  # till then the pass going on waits for forked children
        self._seqnr = 0
        self._pages_scanned = self._pages_skipped = 0
        self._pass_hashed = 0
        self._pass_changed = False
        self._pruned = -math.inf
        self._cpu = 0.0
        self._departed_cpu_ns = 0
        self._shown = Snapshot(Counters(run=self._knobs.run))
        self._urgent = False

    # -- who takes part ---------------------------------------------------------------------------------

    def enter(self, space: AddressSpace, comm: str = "", swap: str = "") -> MmSlot:
        """A process joins (__ksm_enter). It is looked at before the pass going on ends.

        So is a child that a process forked before it was looked at, if it joins within `JOIN_SECONDS`."""
        with self._mmlist_lock:
            domain = self._domains.get(space.domain)
            if domain is None:
                user = user_of(space.domain)
                account, foreign = self._accounts.of(user), self._accounts.is_foreign(user)
                domain = Domain(space.domain, account, foreign, self._quotas.of(user))
                self._domains[space.domain] = domain
            slot = MmSlot(space, domain, self._next_number, comm, swap)
            self._next_number += 1
            self._slots[slot.number] = slot
            slot.owed = self._lost.forget(slot.pid)
            for before in [s for s in self._slots.values() if s.pid == slot.pid and s is not slot]:
                slot.owed += before.owed  # it is not forgotten yet
                before.astray = False
            self._joining.append(slot)
            self._advisor.joined()
        return slot

    def exit(self, slot: MmSlot) -> None:
        """A process leaves (__ksm_exit). Its pages stay as they are; they are just not known any more."""
        slot.gone = True
        if self.mutex.acquire(blocking=False):
            try:
                self._end_of_work()
            finally:
                self.mutex.release()

    def slots(self, pid: int | None = None) -> list[MmSlot]:
        """Those that take part, or those of them with that pid (a process that called exec may have two)."""
        with self._mmlist_lock:
            return [s for s in self._slots.values() if not s.gone and pid in (None, s.pid)]

    # -- one at a time ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _working(self, cancelled: Cancelled = lambda: False) -> Iterator[None]:
        """Hold the mutex. Whatever is raised meanwhile, the books of all domains agree afterwards. OSError EINTR when
        `cancelled()` before it could be had."""
        with hold(self.mutex, cancelled):
            started = self._cpu_clock()
            try:
                self._reap()
                yield
            except AddressSpaceGone:  # comes before anything is changed
                raise
            except Exception:
                self._mend()
                raise
            finally:
                self._cpu += self._cpu_clock() - started
                self._end_of_work()

    def _end_of_work(self) -> None:
        try:
            self._reap()
        except Exception:
            self._mend()
            self._reap()
        self._publish()

    def _mend(self) -> None:
        """After a mistake of ksmd's own, which may have ended a change in the middle."""
        with self._mmlist_lock:
            domains = list(self._domains.values())
        for domain in domains:
            books.mend(domain)

    def _reap(self) -> None:
        """Take in who joined, forget who left. Only ever between two steps: nobody's refs are in hand here."""
        with self._mmlist_lock:
            joining, self._joining = self._joining, []
            gone = [slot for slot in self._slots.values() if slot.gone]
            for slot in joining:
                slot.domain.slots.append(slot)
            for slot in gone:
                del self._slots[slot.number]
        for slot in joining:
            if self._in_pass:
                self._cursor[slot] = 0
        for slot in gone:
            self._lost.note(slot)
            self._cursor.pop(slot, None)
            self._carried.pop(slot, None)
            self._departed_cpu_ns += slot.cpu_ns
            slot.domain.drop(slot)
        with self._mmlist_lock:
            named = {slot.domain.number for slot in self._slots.values()}
            for number in [n for n in self._domains if n not in named]:
                self._domains.pop(number).release()

    # -- the scan ---------------------------------------------------------------------------------------

    def do_scan(self, budget: int | None = None) -> int:
        """One batch (ksm_do_scan): hash at most `budget` pages (None: as many as the advisor says), or merge one slice
        of the candidates that a pass left. Returns how many pages were looked at or tried; 0 when stopped.

        Candidates are matched when a pass is over, not while it goes on: with all of memory in view, runs of
        equal pages are found whole, and one slice is merged at a time, so that nobody waits long for the mutex.
        """
        with self._working():
            self._listen()
            if self._knobs.run != Run.MERGE:
                return 0
            candidates = self._merge_slice()
            if candidates is not None:
                return candidates
            return self._scan_batch(self._advisor.batch_pages() if budget is None else budget)

    def _listen(self) -> None:
        """Take up again with those who were silent and are no more, and unmerge what could not be unmerged before."""
        slots = [slot for slot in self.slots() if (slot.silent or slot.owed) and slot in slot.domain.slots]
        for slot in slots:
            try:
                if slot.silent:
                    self._hear_out(slot)
                if not slot.silent and slot.owed:
                    self._unmerge_owed(slot)
            except AddressSpaceGone as e:
                slot.lose(e)
            except Exception as e:  # a mistake that is about one process must not keep ksmd from all others
                slot.lose(e)
                self._mend()
        self._reap()
        self._work.wary = any(slot.silent for slot in slots if not slot.gone)

    def _hear_out(self, slot: MmSlot) -> None:
        silent, replies = slot.space.catch_up()
        slot.unheard += replies
        slot.silent = silent
        while slot.unheard and not slot.silent:
            seen = heard(slot, slot.unheard[0], time.perf_counter_ns())
            del slot.unheard[0]
            self._take_in(slot, seen, Seen())
        if not slot.silent:
            for refs in slot.aside:
                slot.domain.deferred.defer(refs, self._work.passes)
            slot.aside = []

    def _unmerge_owed(self, slot: MmSlot) -> None:
        owed, slot.owed = slot.owed, []
        for unmerge in owed:
            extent = (unmerge.vpn, unmerge.npages)
            self._unmerge_slot(slot, extent, lambda: False, unmerge.leave_alone, UnmergeResult())

    def _merge_slice(self) -> int | None:
        for domain in sorted(self._domains.values(), key=lambda domain: domain.is_foreign):
            if domain.is_foreign and not self._is_turn_of_others():
                return None
            if domain.candidates and not domain.patience.is_spent:
                began = self._clock()
                self._keep_room_for_segments()
                self._verify(domain)
                if not domain.slots:  # they all went: there is no such domain any more
                    continue
                refs = domain.next_candidates()
                self._pass_changed |= bool(len(refs))
                self._begin_slice(domain)
                started, merged = self._cpu_clock(), self._work.statuses[PageStatus.DONE]
                try:
                    merge_candidates(domain, refs, self._work)
                except Exception:
                    domain.deferred.defer(refs, self._work.passes)
                    raise
                if self._work.statuses[PageStatus.DONE] == merged:
                    self._advisor.spent_in_vain(self._clock(), self._cpu_clock() - started)
                self._took[domain.is_foreign] += self._clock() - began
                return len(refs)
        return None

    def _is_turn_of_others(self) -> bool:
        """Whether foreign processes are served now: the owner's were all looked at in this pass."""
        if not self._in_pass:
            return not self._are_there_own()
        return not self._others_had_their_turn() and all(slot.domain.is_foreign for slot in self._cursor)

    def _others_had_their_turn(self) -> bool:
        return self._took[True] > max(FOREIGN_SECONDS, self._took[False])

    def _keep_room_for_segments(self) -> None:
        """Of each segment somebody has to hold the descriptor, as long as it may be handed out. Where they are scarce,
        the oldest segments are retired, of the domain that has most, so that merging goes on."""
        domains = [domain for domain in self._domains.values() if domain.stable.segments]
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

    def _verify(self, domain: Domain) -> None:
        """Before pages are matched: whose processes are not who they were (their user is another, say) are dropped."""
        now = self._clock()
        for slot in domain.slots:
            if now - slot.verified >= VERIFY_SECONDS and not slot.gone:
                try:
                    slot.space.verify()
                    slot.verified = now
                except AddressSpaceGone as e:
                    slot.lose(e)
        self._reap()

    def _begin_slice(self, domain: Domain) -> None:
        self._work.ends = time.monotonic() + FOREIGN_SLICE_SECONDS if domain.is_foreign else math.inf
        self._allow()

    def _allow(self) -> None:
        """How much may be merged in each memory cgroup by `max_overcommit`, as things stand."""
        percent = self._knobs.max_overcommit
        self._work.allowance = None
        if not percent:
            return
        committed: dict[str, int] = {}
        available: dict[str, int] = {}
        for slot in self.slots():
            if slot.silent:
                committed[slot.group] = committed.get(slot.group, 0) + slot.merged
        for slot, (group, there) in self._work.each(self.slots(), headroom).items():
            slot.group = group
            committed[group] = committed.get(group, 0) + slot.merged
            available[group] = min(available.get(group, there), there)
        self._work.allowance = {
            group: available[group] * percent // 100 // PAGE_SIZE - committed[group] for group in available
        }

    def _scan_batch(self, budget: int) -> int:
        if not self._in_pass:
            self._begin_pass()
            if not self._cursor:  # nobody there: that is no pass
                self._in_pass = False
                return 0
        started = self._cpu_clock()
        spent_before = sum(slot.cpu_ns for slot in self._cursor)
        scanned = list(self._cursor)
        total = Seen()
        began = self._clock()
        self._put_off()
        for _ in range(ROUNDS):
            if not self._cursor or total.hashed >= budget or self._clock() - began > BATCH_SECONDS:
                break
            own = [slot for slot in self._cursor if not slot.domain.is_foreign]
            if not own and self._others_had_their_turn() and self._are_there_own():
                self._carried, self._cursor = self._cursor, {}
                break
            before = self._clock()
            self._scan_step(own or list(self._cursor), budget - total.hashed, total)
            self._took[not own] += self._clock() - before
        self._pages_scanned += total.hashed
        self._pass_hashed += total.hashed
        self._pass_changed |= bool(total.changed)
        in_processes = sum(slot.cpu_ns for slot in scanned) - spent_before
        cpu = self._cpu_clock() - started + in_processes / 1e9
        self._advisor.scanned(self._clock(), cpu, total.hashed, total.first_looks, total.broken)
        if not self._cursor and self._joins_until <= self._clock():
            self._end_pass()
        return total.hashed

    def _begin_pass(self) -> None:
        with self._mmlist_lock:
            slots = [slot for slot in self._slots.values() if not slot.gone and slot not in self._joining]
        slots.sort(key=lambda slot: slot.passes > 0)  # the new ones first; they are not made to wait
        for slot in slots:
            if slot not in self._carried:
                slot.ages.begin_pass(bool(self._knobs.smart_scan) and not slot.hash_all)
        self._cursor = {slot: self._carried.get(slot, 0) for slot in slots}
        self._carried = {}
        self._took = {False: 0.0, True: 0.0}
        self._in_pass = True
        self._pass_hashed = 0

    def _are_there_own(self) -> bool:
        return any(not slot.domain.is_foreign for slot in self.slots())

    def _scan_step(self, slots: list[MmSlot], budget: int, total: Seen) -> None:
        """Ask processes of the pass for one step, or as many as the budget is worth asking."""
        slots = slots[: max(1, budget // STEP_PAGES)]
        share = budget // len(slots)

        def ask(slot: MmSlot) -> list[Look]:
            """Some looks without waiting for others in between; if its areas changed, these must be taken in first."""
            looks: list[Look] = []
            vpn, left = self._cursor[slot], share
            while len(looks) < LOOKS and left > 0:
                first, end = slot.ages.ahead(vpn)
                try:
                    looks.append(look(slot, first, left, self._flags(slot), end))
                except AddressSpaceSilent as e:
                    slot.lose(e)
                    self._work.wary = True
                    break  # what it said before counts
                vpn, left = looks[-1].reply.next_vpn, left - len(looks[-1].reply.checksums)
                if not vpn or looks[-1].areas is not None or looks[-1].wall_ns > A_MOMENT * 1e9:
                    break
            return looks

        looks = self._work.each(slots, ask)
        for slot in slots:
            try:
                for seen in looks.get(slot, []):
                    self._take_in(slot, seen, total)
                    self._cursor[slot] = seen.reply.next_vpn
            except AddressSpaceGone as e:
                slot.lose(e)
            except Exception as e:  # whatever it said that ksmd cannot cope with, the others are looked at all the same
                slot.lose(e)
                self._mend()
            if slot.is_away:
                del self._cursor[slot]
            elif not self._cursor[slot]:
                del self._cursor[slot]
                slot.looked_at()

    def _put_off(self) -> None:
        """Who kept ksmd waiting for too long, or is silent, is not asked in this pass."""
        for slot in [s for s in self._cursor if s.is_put_off]:
            del self._cursor[slot]

    def _take_in(self, slot: MmSlot, seen: Look, total: Seen) -> None:
        with slot.waited_for():
            outcome = ingest(slot.domain, slot, seen, self._work.passes)
        if outcome.first_looks or outcome.turned:
            slot.expect(slot.unmerged)
        if seen.reply.forked < JOIN_SECONDS:
            self._joins_until = max(self._joins_until, self._clock() + JOIN_SECONDS - seen.reply.forked)
        total.hashed += outcome.hashed
        total.first_looks += outcome.first_looks
        total.changed += outcome.changed
        total.broken += outcome.broken
        slot.stirred |= bool(outcome.changed or outcome.turned)

    def _flags(self, slot: MmSlot) -> ScanFlag:
        """How to look at a process now."""
        if slot.hash_all or not self._knobs.smart_scan:
            flags = ScanFlag.ALL
        else:
            flags = ScanFlag.STILL if slot.is_still else ScanFlag.NONE
        return flags if self._knobs.merge_across_nodes else flags | ScanFlag.NODES

    def _end_pass(self) -> None:
        self._in_pass = False
        self._seqnr += 1
        self._work.passes += 1
        candidates = sum(slot.with_checksum for slot in self.slots())
        self._pages_skipped += max(0, candidates - self._pass_hashed)
        prune = self._clock() - self._pruned >= self._knobs.stable_node_chains_prune_millisecs / 1000
        if prune:
            self._pruned = self._clock()
        for domain in self._domains.values():
            domain.end_pass(self._work.passes)
            for slot in [s for s in domain.slots if s.pending_breaks and not s.is_away]:
                try:
                    retry_pending(domain, slot, self._work.passes)
                except AddressSpaceGone as e:
                    slot.lose(e)
            self._pass_changed |= restore(domain, [s for s in domain.slots if not s.is_away], self._work)
            if prune:
                self._prune(domain)
        self._advisor.pass_over(self._clock(), quiet=not self._pass_changed)
        self._pass_changed = False

    def _prune(self, domain: Domain) -> None:
        """Free the segments that are mostly dead, if that is worth the trouble (what the kernel does to stale stable
        nodes, each of which holds one page; here a segment holds many)."""
        passes = self._work.passes
        if domain.stable.dead_nodes < SPARSE_PAGES:
            return
        sparse = [
            (segment.base, segment.base + segment.rows, segment.dead)
            for segment in domain.stable.segments
            if segment.handle and segment.live < SPARSE_SHARE * segment.size and passes - segment.born > SPARSE_PASSES
        ]
        if sum(dead for _, _, dead in sparse) < SPARSE_PAGES:
            return
        for first, past, _ in sparse:
            if not move_out(domain, [s for s in domain.slots if not s.is_away], (first, past)):
                return

    # -- merging and unmerging on request ---------------------------------------------------------------

    def merge_range(self, slot: MmSlot, vpn: int, npages: int) -> MergeOutcome:
        """Merge pages now, also with one another: their owner says they will not change, so there is no waiting
        for a pass; works while `run` is 0, too. AddressSpaceGone if the process is not there any more; OSError EBUSY
        while `run` is 2."""
        with self._working(), self._charged(slot.domain):
            if self._knobs.run == Run.UNMERGE:
                raise knob_rules.error(errno.EBUSY, "run is 2: nothing is to be merged")
            self._scan_range(slot, vpn, npages)
            self._keep_room_for_segments()
            self._verify(slot.domain)
            if slot.gone:
                raise AddressSpaceGone(slot.lost)
            if restore_range(slot.domain, slot, vpn, npages):
                self._scan_range(slot, vpn, npages)
            before = self._work.statuses.copy()
            domain = slot.domain
            refs = self._refs_in(slot, vpn, npages)
            merged = int(np.count_nonzero(_is_merged(domain, refs)))
            candidates = HAS_CHECKSUM[domain.state[refs]]
            candidates &= domain.state[refs] != PageState.UNSHARED
            candidates &= domain.state[refs] != PageState.COLLIDED
            for part in np.array_split(refs[candidates], 1 + int(candidates.sum()) // SLICE_PAGES):
                self._refuse_guests_that_kept_others_waiting(domain)
                self._begin_slice(domain)
                merge_candidates(domain, sorted_refs([part.astype(np.uint32)]), self._work)
            if slot.gone:
                raise AddressSpaceGone("gone while it was merged")
            now = int(np.count_nonzero(_is_merged(domain, refs)))
            return MergeOutcome(now, now - merged, show.failures((self._work.statuses - before).tolist()))

    @contextlib.contextmanager
    def _charged(self, domain: Domain) -> Iterator[None]:
        """What foreign processes ask for takes time off their user's account, all of it."""
        began = self._clock()
        try:
            yield
        finally:
            if domain.is_foreign:
                domain.patience.spend(self._clock() - began)

    def _refuse_guests_that_kept_others_waiting(self, domain: Domain) -> None:
        if domain.is_foreign and domain.patience.is_spent:
            raise knob_rules.error(errno.EBUSY, "others were kept waiting for too long")

    def recount_zeros(self, slot: MmSlot) -> None:
        """Have the row of a process count the pages that are merged with the zero page at this moment, as the kernel's
        counter does. All others are as they were when last looked at. Where there are many, so are these, and those of
        a guest: the kernel looks them up in its memory, which it can keep locked for as long as it likes."""
        if slot.domain.is_foreign:
            return
        with self._working():
            try:
                if not slot.is_away:
                    recount_zeros(slot.domain, slot)
            except AddressSpaceGone as e:
                slot.lose(e)

    def _scan_range(self, slot: MmSlot, vpn: int, npages: int) -> None:
        at, total = vpn, Seen()
        try:
            while at < vpn + npages:
                if slot.gone:
                    raise AddressSpaceGone("has left")
                self._refuse_guests_that_kept_others_waiting(slot.domain)
                began = self._clock()
                seen = look(slot, at, vpn + npages - at, self._flags(slot))
                self._take_in(slot, seen, total)
                slot.kept_waiting(self._clock() - began - len(seen.reply.checksums) / LOOK_RATE)
                if not seen.reply.next_vpn:
                    break
                at = seen.reply.next_vpn
        except AddressSpaceGone as e:
            slot.lose(e)
            raise
        finally:
            self._pages_scanned += total.hashed

    def _refs_in(self, slot: MmSlot, vpn: int, npages: int) -> Ints:
        return np.concatenate([NONE, *(refs for _, refs in slot.domain.known(slot, vpn, npages))])

    def unmerge(
        self,
        slot: MmSlot | None = None,
        vpn: int = WHOLE[0],
        npages: int = WHOLE[1],
        cancelled: Cancelled = lambda: False,
    ) -> UnmergeResult:
        """Give pages private copies again: those of a range, a process, or (None) of all.

        Stops at the first error, which is in the outcome: ENOMEM, or EINTR when `cancelled()` said so between
        two steps. What was unmerged is left alone until it changes. What was not, for want of memory or because it
        cannot be mapped, stays merged and is tried again by later passes. Two errors stop nothing, and are told at the
        end: EFAULT of pages that cannot be mapped, and ETIMEDOUT of a process that does not answer, or is lost for
        another reason: it is unmerged when it answers again. That a process ended is no error: nothing of it is left to
        unmerge.
        """
        with self._working(cancelled):
            return self._unmerge([slot] if slot else None, (vpn, npages), cancelled, leave_alone=True)

    def _unmerge(
        self, only: list[MmSlot] | None, extent: tuple[int, int], cancelled: Cancelled, leave_alone: bool
    ) -> UnmergeResult:
        self._listen()
        result = UnmergeResult()
        slot = only[0] if only else self._next_slot(0)
        while slot is not None:
            if not slot.gone:
                self._unmerge_slot(slot, extent, cancelled, leave_alone, result)
            if result.stops:
                break
            slot = None if only else self._next_slot(slot.number)
        self._reap()
        lost = [slot.pid for slot in only or ()]
        if not result.stops:
            self._lost.owe(lost, Owed(*extent, leave_alone))
        for row in self._lost.rows(lost):
            result.add_lost(row)
        return result

    def _unmerge_slot(
        self, slot: MmSlot, extent: tuple[int, int], cancelled: Cancelled, leave_alone: bool, result: UnmergeResult
    ) -> None:
        if slot not in slot.domain.slots:  # joined this moment
            self._reap()
        merged = slot.merged
        try:
            if not slot.silent and (halted := slot.space.halted()):
                slot.lose(AddressSpaceSilent(slot.pid, halted))
            if slot.silent:
                raise AddressSpaceSilent(slot.pid, slot.silent)
            with slot.space.interruptible(cancelled):
                row, last = unmerge_pages(slot.domain, slot, *extent, cancelled, leave_alone, self._work.concurrently)
        except AddressSpaceGone as e:
            slot.lose(e)
            result.pages_unmerged += max(0, merged - slot.merged)
            if cancelled():
                result.errno = errno.EINTR
            elif slot.silent:
                self._owe(slot, Owed(*extent, leave_alone), result)
            return
        result.add(row, last)
        slot.pending_breaks = [run for run in slot.pending_breaks if not _within(run, extent)]
        if row.errno in (errno.ENOMEM, errno.EFAULT) and leave_alone:
            slot.pending_breaks.append(extent)

    def _owe(self, slot: MmSlot, owed: Owed, result: UnmergeResult) -> None:
        """A process is silent: it is unmerged as soon as it is not. Nothing is owed to one that is known to have
        nothing merged."""
        if slot.passes and not slot.merged:
            return
        if owed not in slot.owed:
            slot.owed.append(owed)
        row = ProcessBreak(slot.pid, errno.ETIMEDOUT, 0, slot.merged, slot.comm, slot.silent)
        result.add_lost(row)

    def _next_slot(self, number: int) -> MmSlot | None:
        """The process after that of `number` in the list, whoever joined or left meanwhile."""
        with self._mmlist_lock:
            return next((slot for n, slot in self._slots.items() if n > number and not slot.gone), None)

    def _unmerge_and_remove_all_rmap_items(self, cancelled: Cancelled) -> UnmergeResult:
        """All of it: only then is `full_scans` zero again. The cursor goes back to the head either way."""
        result = self._unmerge(None, WHOLE, cancelled, leave_alone=False)
        self._cursor, self._carried = {}, {}
        self._in_pass = False
        self._reap()
        if not result.errno:
            self._seqnr = 0
            for domain in self._domains.values():
                domain.start_afresh()
        return result

    # -- run control and the other knobs ----------------------------------------------------------------

    def get(self, name: str) -> str:
        """The value of a knob, as its file would show it. KeyError: there is no such knob."""
        if name not in knob_rules.KNOBS:
            raise KeyError(name)
        return str(getattr(self._knobs, name))

    def knobs(self) -> dict[str, str]:
        """All knobs."""
        return {name: self.get(name) for name in knob_rules.KNOBS}

    def set(self, name: str, value: str | int, cancelled: Cancelled = lambda: False) -> None:
        """Set a knob. KeyError: no such knob. OSError: EINVAL or EBUSY as the kernel has it.

        Setting `run` to 2 unmerges everything, and raises `UnmergeFailed` if that fails; `run` is 0 then.
        """
        new = knob_rules.KNOBS[name].parse(value)
        with self._working(cancelled):
            merged = any(slot.merged for slot in self.slots())
            knob_rules.check_change(self._knobs, name, new, merged)
            if name == "run":
                self._set_run(Run(int(new)), cancelled)
                return
            if name == "pages_to_scan" and self._knobs.advisor_mode == "cpu":
                self._knobs.advisor_mode = "none"
            if name == "advisor_mode" and new == "scan-time" != self._knobs.advisor_mode:
                self._knobs.pages_to_scan = self._knobs.advised_pages[0]
            if name == "merge_across_nodes" and new != self._knobs.merge_across_nodes:
                for slot in self.slots():
                    slot.hash_all = True
            setattr(self._knobs, name, new)
            self._work.max_page_sharing = self._knobs.sharing
            self._work.use_zero_pages = bool(self._knobs.use_zero_pages)
            self._work.smart_scan = bool(self._knobs.smart_scan)

    def _set_run(self, run: Run, cancelled: Cancelled) -> None:
        if run == self._knobs.run:
            return
        self._knobs.run = run
        self._advisor.joined()
        if run == Run.MERGE:
            self._lost.merge_again()
            for slot in self.slots():
                slot.owed = [owed for owed in slot.owed if owed.leave_alone]
        if run == Run.UNMERGE:
            result = self._unmerge_and_remove_all_rmap_items(cancelled)
            if result.errno:
                self._knobs.run = Run.STOP
                raise UnmergeFailed(result)

    # -- what is shown ----------------------------------------------------------------------------------

    def next_wait(self) -> float:
        """Seconds until `do_scan` should be called again; infinite while there is nothing to do until
        somebody joins or a knob is set."""
        wait = self._next_scan()
        return min(wait, LISTEN_EVERY) if any(slot.owed for slot in self.slots()) else wait

    def _next_scan(self) -> float:
        if self._knobs.run != Run.MERGE or not self._slots:
            return math.inf
        if self._in_pass and not self._cursor and not self._joining:
            return max(0.0, self._joins_until - self._clock())
        return self._advisor.wait(self._clock(), self._urgent or bool(self._joining))

    def snapshot(self) -> Snapshot:
        """How things stood after the last batch: counters and all rows, of the same moment."""
        return self._shown

    def counters(self) -> Counters:
        """Those of the snapshot."""
        return self._shown.counters

    def lost(self, pids: Collection[int] = ()) -> list[ProcessBreak]:
        """A row for each process, of `pids` or all, with merged pages that nothing can be asked of."""
        return self._lost.rows(pids)

    def owe_lost(self, pids: Collection[int]) -> None:
        """Those of `pids`, or all, that are lost are to be unmerged if they come back."""
        self._lost.owe(pids, Owed(*WHOLE, leave_alone=True))

    def rows(self) -> tuple[ProcessRow, ...]:
        """A row for every process, of the same moment."""
        return self._shown.processes

    def metadata_bytes(self) -> int:
        """Bytes of memory that knowing pages takes, of the same moment (temporaries of a batch are not in it)."""
        return self._shown.counters.metadata_bytes

    def _publish(self) -> None:
        """Make a new snapshot, for readers that must not wait."""
        with self._mmlist_lock:
            domains = list(self._domains.values())
            slots = list(self._slots.values())
        self._urgent = any(domain.candidates and not domain.patience.is_spent for domain in domains)
        self._urgent |= any(not slot.passes and not slot.is_put_off for slot in slots)
        rows = tuple(show.domain_row(domain) for domain in domains)
        counters = Counters(
            run=self._knobs.run,
            # A pass has not done its work before its candidates are merged: who waits for two passes, as KSM's users
            # do, wants to see what came of them.
            full_scans=self._seqnr - any(domain.candidates for domain in domains),
            pages_scanned=self._pages_scanned,
            pages_skipped=self._pages_skipped,
            cpu_seconds=self._cpu + (self._departed_cpu_ns + sum(slot.cpu_ns for slot in slots)) / 1e9,
            merge_failures=show.failures(self._work.statuses.tolist()),
            **show.total(domains, rows),
        )
        self._shown = Snapshot(counters, rows, tuple(show.process_row(slot) for slot in slots))


class UnmergeFailed(OSError):
    """Setting `run` to 2 did not get to its end. `result` says how far it came."""

    def __init__(self, result: UnmergeResult) -> None:
        super().__init__(*knob_rules.error(result.errno, "run").args)
        self.result = result


def headroom(slot: MmSlot) -> tuple[str, int]:
    """The memory cgroup of a process and the bytes available there, as it says now. AddressSpaceGone."""
    with slot.waited_for():
        return slot.space.headroom()


@contextlib.contextmanager
def hold(lock: threading.Lock, cancelled: Cancelled) -> Iterator[None]:
    """Hold a lock that somebody may keep for as long as a process does not answer. OSError EINTR when `cancelled()` is
    first."""
    while not lock.acquire(timeout=0.05):
        if cancelled():
            raise knob_rules.error(errno.EINTR, "another request is going on")
    try:
        yield
    finally:
        lock.release()


def _within(run: tuple[int, int], extent: tuple[int, int]) -> bool:
    return extent[0] <= run[0] and run[0] + run[1] <= extent[0] + extent[1]


def _is_merged(domain: Domain, refs: Ints) -> Bools:
    return IS_MERGED[domain.state[refs]]
