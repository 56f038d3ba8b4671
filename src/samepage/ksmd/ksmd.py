"""The daemon itself: run control, and what others may ask of it.

Its parts do the work: `mm_list` has the processes, `passes` looks at them, `slices` merges what a pass found,
`on_request` merges what a process wants merged at once, `unmerge_all` undoes it, and `places` sends processes away that
belong elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
import math
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

from samepage.ksmd import counters as show
from samepage.ksmd import knobs as knob_rules
from samepage.ksmd.advisor import NEW_SECONDS, Advisor
from samepage.ksmd.counters import Counters, ProcessRow, Snapshot
from samepage.ksmd.knobs import Knobs, Run
from samepage.ksmd.look import recount_zeros
from samepage.ksmd.merge_work import Concurrently, MergeWork
from samepage.ksmd.mm_list import MmList
from samepage.ksmd.mm_slot import WHOLE, MmSlot
from samepage.ksmd.on_request import MergeOutcome, MergeRequests
from samepage.ksmd.passes import Passes
from samepage.ksmd.places import Places
from samepage.ksmd.slices import Slices
from samepage.ksmd.unmerge import Cancelled, UnmergeResult
from samepage.ksmd.unmerge_all import Unmerging
from samepage.memory import AddressSpace, AddressSpaceGone

SHOWN_FOR = 0.5
"""Seconds for which batches may go on without a new snapshot, unless somebody asks for one: it takes some
microseconds for each process."""

LISTEN_EVERY = 0.2
"""Seconds between two questions whether a process that is to be unmerged answers again."""


class Ksmd:
    """Finds equal pages in address spaces, and has them share one copy.

    Any thread may call any method. One works at a time, under `mutex` (ksm_thread_mutex); `enter`, `exit`,
    `look_again`, `snapshot`, `counters`, `rows`, `get` and `next_wait` never wait for it.

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
        new_seconds: float = NEW_SECONDS,
    ) -> None:
        """`new_seconds`: for a page that is seen for the first time, so much by `cpu_clock` is free of charge."""
        self.mutex = threading.Lock()
        self.mm_list = MmList(owner)
        self._clock, self._cpu_clock = clock, cpu_clock
        self._knobs = Knobs()
        self._advisor = Advisor(self._knobs, new_seconds)
        self._work = MergeWork(concurrently)
        self._passes = Passes(self.mm_list, self._knobs, self._advisor, self._work, clock, cpu_clock)
        self._unmerging = Unmerging(self._passes)
        self._places = Places(self._passes, self._unmerging)
        self.slices = Slices(self._passes, self._places.verify)
        self._requests = MergeRequests(self._passes, self.slices)
        self._cpu = 0.0
        self._shown = Snapshot(Counters(run=self._knobs.run))
        self._shown_at = -math.inf
        self._is_stale = False  # something happened since,
        self._is_asked_for = False  # and somebody wanted to see it
        self._urgent = False

    # -- who takes part ---------------------------------------------------------------------------------

    def enter(self, space: AddressSpace, comm: str = "", swap: str = "") -> MmSlot:
        """A process joins (__ksm_enter). It is looked at before the pass going on ends.

        So is a child that a process forked before it was looked at, if it joins within `JOIN_SECONDS`."""
        slot = self.mm_list.enter(space, comm, swap)
        self._advisor.joined()
        return slot

    def exit(self, slot: MmSlot) -> None:
        """A process leaves (__ksm_exit). Its pages stay as they are; they are just not known any more."""
        slot.gone = True
        self._is_stale = True
        if self.mutex.acquire(blocking=False):
            try:
                self._end_of_work(is_batch=True)
            finally:
                self.mutex.release()

    def slots(self, pid: int | None = None) -> list[MmSlot]:
        """Those that take part, or those of them with that pid (a process that called exec may have two)."""
        return self.mm_list.slots(pid)

    def look_again(self) -> None:
        """Call this when the rules for merge domains have changed: the next `do_scan` looks where each process
        belongs."""
        self._places.look_again()

    # -- one at a time ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _working(self, cancelled: Cancelled = lambda: False, is_batch: bool = False) -> Iterator[None]:
        """Hold the mutex. Whatever is raised meanwhile, the books of all domains agree afterwards. Raises OSError EINTR
        if `cancelled()` says so before the mutex is free."""
        with hold(self.mutex, cancelled):
            started = self._cpu_clock()
            try:
                self.mm_list.reap()
                yield
            except AddressSpaceGone:  # comes before anything is changed
                raise
            except Exception:
                self.mm_list.mend()
                raise
            finally:
                self._cpu += self._cpu_clock() - started
                self._end_of_work(is_batch)

    def _end_of_work(self, is_batch: bool = False) -> None:
        """What somebody asked for is shown when it is done. What came of a batch is only if the snapshot is old, or
        somebody wants to see it: see `snapshot`."""
        for _ in range(2):
            try:
                self.mm_list.reap()
                break
            except Exception:  # whoever is left is forgotten the next time
                self.mm_list.mend()
        domains, slots = self.mm_list.domains(), self.mm_list.everybody()
        self._urgent = any(domain.candidates and not domain.patience.is_spent for domain in domains)
        self._urgent |= any(not slot.passes and not slot.is_put_off and not slot.is_left_out for slot in slots)
        if is_batch and not self._is_asked_for and self._clock() - self._shown_at < SHOWN_FOR:
            self._is_stale = True
        else:
            self._publish()

    def do_scan(self, budget: int | None = None) -> int:
        """One batch (ksm_do_scan): hash at most `budget` pages (None: as many as the advisor says), or merge one slice
        of the candidates that a pass left. Returns how many pages were looked at or tried; 0 when stopped.

        Candidates are matched when a pass is over, not while it goes on: with all of memory in view, runs of
        equal pages are found whole, and one slice is merged at a time, so that nobody waits long for the mutex.
        """
        with self._working(is_batch=True):
            self._unmerging.listen()
            self._places.look()
            if self._knobs.run != Run.MERGE:
                return 0
            candidates = self.slices.merge_next()
            if candidates is not None:
                return candidates
            return self._passes.scan(self._advisor.batch_pages() if budget is None else budget)

    def merge_range(self, slot: MmSlot, vpn: int, npages: int) -> MergeOutcome:
        """Merge pages now, also with one another: their owner says they will not change, so there is no waiting
        for a pass; works while `run` is 0, too. AddressSpaceGone if the process is not there any more; OSError EBUSY
        while `run` is 2."""
        with self._working():
            if self._knobs.run == Run.UNMERGE:
                raise knob_rules.error(errno.EBUSY, "run is 2: nothing is to be merged")
            return self._requests.merge(slot, vpn, npages)

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
            return self._unmerging.unmerge(slot, (vpn, npages), cancelled, leave_alone=True)

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
            merged = any(slot.merged for slot in self.mm_list.slots())
            knob_rules.check_change(self._knobs, name, new, merged)
            if name == "run":
                self._set_run(Run(int(new)), cancelled)
                return
            if name == "pages_to_scan" and self._knobs.advisor_mode == "cpu":
                self._knobs.advisor_mode = "none"
            if name == "advisor_mode" and new == "scan-time" != self._knobs.advisor_mode:
                self._knobs.pages_to_scan = self._knobs.advised_pages[0]
            if name == "merge_across_nodes" and new != self._knobs.merge_across_nodes:
                for slot in self.mm_list.slots():
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
            self.mm_list.lost.merge_again()
            for slot in self.mm_list.slots():
                slot.owed = [owed for owed in slot.owed if owed.leave_alone]
        if run == Run.UNMERGE:
            result = self._unmerging.everything(cancelled)
            if result.errno:
                self._knobs.run = Run.STOP
                raise UnmergeFailed(result)

    # -- what is shown ----------------------------------------------------------------------------------

    def next_wait(self) -> float:
        """Seconds until `do_scan` should be called again; infinite while there is nothing to do until
        somebody joins or a knob is set."""
        mm_list = self.mm_list
        if self._knobs.run != Run.MERGE or mm_list.is_empty:
            wait = math.inf
        elif mm_list.in_pass and not mm_list.cursor and not mm_list.is_joined:
            wait = self._passes.waits_for_children()
        else:
            wait = self._advisor.wait(self._clock(), self._urgent or mm_list.is_joined)
        slots = mm_list.slots()
        if self._knobs.run == Run.MERGE:
            now = self._clock()
            wait = min([wait, *(slot.rests_in(now) for slot in slots)])
        return min(wait, LISTEN_EVERY) if any(slot.owed or slot.leaving for slot in slots) else wait

    def snapshot(self) -> Snapshot:
        """The state after the last batch: counters and all rows, of the same moment. While a batch goes on, it may be
        the state before those of the last half second."""
        if self._is_stale:
            if self.mutex.acquire(blocking=False):
                try:
                    self._end_of_work()
                finally:
                    self.mutex.release()
            else:
                self._is_asked_for = True
        return self._shown

    def counters(self) -> Counters:
        """Those of the snapshot."""
        return self.snapshot().counters

    def rows(self) -> tuple[ProcessRow, ...]:
        """A row for every process, of the same moment."""
        return self.snapshot().processes

    def _publish(self) -> None:
        """Make a new snapshot, for readers that must not wait."""
        self._is_stale, self._is_asked_for, self._shown_at = False, False, self._clock()
        domains, slots = self.mm_list.domains(), self.mm_list.everybody()
        rows = tuple(show.domain_row(domain) for domain in domains)
        counters = Counters(
            run=self._knobs.run,
            # A pass has not done its work before its candidates are merged: whoever waits for two passes, as KSM's
            # users do, wants to see what came of them.
            full_scans=self._passes.seqnr - any(domain.candidates for domain in domains),
            pages_scanned=self._passes.pages_scanned,
            pages_skipped=self._passes.pages_skipped,
            cpu_seconds=self._cpu + (self.mm_list.departed_cpu_ns + sum(slot.cpu_ns for slot in slots)) / 1e9,
            merge_failures=show.failures(self._work.statuses.tolist()),
            **show.total(domains, rows),
        )
        facts = [show.process_facts(slot) for slot in slots]
        self._shown = Snapshot(counters, rows, partial(show.process_rows, facts))


class UnmergeFailed(OSError):
    """Setting `run` to 2 failed before its end. `result` says how far it came."""

    def __init__(self, result: UnmergeResult) -> None:
        super().__init__(*knob_rules.error(result.errno, "run").args)
        self.result = result


@contextlib.contextmanager
def hold(lock: threading.Lock, cancelled: Cancelled) -> Iterator[None]:
    """Hold a lock that somebody may keep for as long as a process does not answer. Raises OSError EINTR if
    `cancelled()` says so first."""
    while not lock.acquire(timeout=0.05):
        if cancelled():
            raise knob_rules.error(errno.EINTR, "another request is going on")
    try:
        yield
    finally:
        lock.release()
