"""The only place that talks to ksmd: a thread that lets it scan, and what everybody else asks of it."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict
from typing import Any

from samepage import agent
from samepage.ksmd import Ksmd, ProcessRow, UnmergeFailed
from samepage.ksmd.counters import Snapshot
from samepage.ksmd.ksmd import hold
from samepage.ksmd.merge_work import Concurrently
from samepage.ksmd.mm_slot import WHOLE, MmSlot, Owed, in_words
from samepage.ksmd.slices import headroom
from samepage.ksmd.unmerge import ProcessBreak, UnmergeResult
from samepage.memory import PAGE_SIZE, AddressSpaceGone
from samepage.memory.agent import AgentAddressSpace
from samepage.memory.conversation import ENDED
from samepage.memory.segments import OPEN
from samepage.process.halt import SILENT
from samepage.process.merge_domain import MergeDomain
from samepage.service import ksm_files
from samepage.service.control import Arrivals, not_unmerged
from samepage.service.engine import Answer, Cancelled, Progress
from samepage.service.log import log_once
from samepage.service.tally import Tally

WORKERS = max(4, os.cpu_count() or 1)
"""How many processes work for ksmd at the same time; more than cores, so that one that hangs does not hold up the
rest."""

AFTER_ERROR = 1.0
"""How long ksmd rests after a defect of its own, in seconds, so that it does not fill the log."""

DONE = "done"
"""Outcome of an unmerge without an error."""

INTRODUCE_TIMEOUT = 1.0
"""How long a process that joins waits for clients with `introductions`, in seconds."""

RECOUNT_TIMEOUT = 0.2
"""How long row() waits for a fresh zero-page count, in seconds. Then it shows the last one."""

STATUS_TIMEOUT = 1.0
"""How long processes have to say what is available to them, in seconds, when somebody asks for all rows. For a process
that does not answer in time, 0 is shown."""

SUMMED = ("ksm_rmap_items", "ksm_merging_pages", "ksm_zero_pages", "merged", "pages_inherited", "ksm_process_profit")
"""The counters of one domain that are sums over the rows of its processes."""


def _needing(total: Answer) -> Answer:
    return total | {"bytes_needed": total["pages_remaining"] * PAGE_SIZE}


def _rows(processes: Iterable[ProcessBreak]) -> list[Answer]:
    """Rows for the processes that could not be unmerged completely, and why."""
    return [asdict(row) | {"errno": errno.errorcode[row.errno]} for row in processes if row.errno]


def _headroom(slot: MmSlot) -> tuple[str, int] | None:
    """Its headroom. None: the process is gone, which others will notice, or it is stopped."""
    try:
        return None if slot.is_away or slot.space.halted() else headroom(slot)
    except AddressSpaceGone:
        return None


def _threads() -> Concurrently:
    """The `map` of a pool whose threads all exist from the start: if starting one failed in the middle of a pass, the
    others would be left with half of the work. If no threads can be started, processes work one at a time."""
    for wanted in (WORKERS, 2):
        pool = ThreadPoolExecutor(wanted, "ksmd")
        go = threading.Event()
        try:
            for _ in range(wanted):
                pool.submit(go.wait)
            return pool.map
        except RuntimeError:
            pool.shutdown(wait=False)
        finally:
            go.set()
    return map


def _answer(row: ProcessRow) -> Answer:
    return asdict(row) | {"domain": str(row.domain), "owner": str(row.owner)}


class Scanner:
    """A ksmd and the thread it scans in (`run`). Every other method may be called from any thread.

    `concurrently` is used like `map`, and is by default that of a pool of `WORKERS` threads.
    """

    name = "user"

    def __init__(self, concurrently: Concurrently | None = None) -> None:
        if concurrently is None:
            concurrently = _threads()
        self._status = ThreadPoolExecutor(WORKERS, "status")
        self._ksmd = Ksmd(concurrently=concurrently, owner=os.getuid())
        self.tally = Tally(os.getuid())
        """What is counted for metrics."""
        self._slots: dict[AgentAddressSpace, MmSlot] = {}
        self._slots_lock = threading.Lock()
        self._introductions: list[Arrivals] = []
        self._recounts: queue.SimpleQueue[tuple[MmSlot, threading.Event]] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._stopping = False
        self._told = (0, 0)
        # ksmd's mutex is not fair: batch after batch would keep others from it for long. A caller holds the gate,
        # and the next batch waits for it.
        self._gate = threading.Lock()

    def run(self) -> None:
        """Scan when ksmd wants to, until `stop`."""
        while not self._stopping:
            try:
                self._recount()
                if self._pause(self._ksmd.next_wait()):
                    continue
                with self._gate:
                    pass
                self._ksmd.do_scan()
                self._tell_of_limits()
            except Exception as e:
                log_once("a mistake of ksmd's own", f"ksmd: {in_words(e)}")
                self._pause(AFTER_ERROR)
            self._hang_up_on_the_gone()

    def limit_segments(self, most: int) -> None:
        """Hold at most so many segments at a time: each takes a descriptor."""
        self._ksmd.slices.segments_max = OPEN.most = most

    def _tell_of_limits(self) -> None:
        if self._ksmd.slices.segments_retired or OPEN.lost:
            message = f"{OPEN.most} descriptors for copies are all in use: old copies are not shared with newcomers"
            if self._told != (told := (self._ksmd.slices.segments_retired, OPEN.lost)):
                log_once("descriptors for copies", message)
                self._told = told

    def stop(self) -> None:
        """End `run` after the batch that is going on."""
        self._stopping = True
        self._wake.set()

    def enter(self, space: AgentAddressSpace) -> None:
        """A process joins."""
        slot = self._ksmd.enter(space, space.comm, space.swap.name.lower())
        with self._slots_lock:
            self._slots[space] = slot
        self.tally.enter(slot.pid, slot.domain.key)
        self._wake.set()

    @contextlib.contextmanager
    def introductions(self) -> Iterator[Arrivals]:
        """While this is in use, processes that want to join are put into this queue first."""
        arrivals: Arrivals = queue.SimpleQueue()
        self._introductions.append(arrivals)
        try:
            yield arrivals
        finally:
            self._introductions.remove(arrivals)

    def introduce(self, pid: int) -> None:
        """Called when a process is about to join: waits until all users of `introductions` know, but not for long."""
        for arrivals in list(self._introductions):
            known = threading.Event()
            arrivals.put((pid, known))
            known.wait(INTRODUCE_TIMEOUT)

    def look_again(self) -> None:
        """Called when the rules have changed: moves processes to the merge domains where they belong now."""
        self._ksmd.look_again()
        self._wake.set()

    def exit(self, space: AgentAddressSpace) -> None:
        """A process left."""
        with self._slots_lock:
            slot = self._slots.pop(space)
        why = space.gone if space.gone != ENDED else None
        self.tally.leave(slot.pid, slot.cpu_ns / 1e9, slot.stalls, why)
        if space.gone not in (None, ENDED):
            slot.lose(AddressSpaceGone(space.gone or ""))
        try:
            self._ksmd.exit(slot)
        except Exception as e:  # whoever accepts connections must not end with it
            log_once("a mistake of ksmd's own", f"ksmd: {in_words(e)}")

    def snapshot(self) -> Snapshot:
        """Counters and all rows of one moment. It waits for nobody."""
        return self._ksmd.snapshot()

    def counters(self, owner: str | None = None) -> dict[str, Any]:
        """ksmd's counters, by name. For one owner, sums over the owner's processes (`SUMMED`), and their number."""
        if owner is None:
            return asdict(self._ksmd.counters())
        rows = [row for row in self._ksmd.rows() if str(row.owner) == owner]
        return {"processes": len(rows)} | {name: sum(getattr(row, name) for row in rows) for name in SUMMED}

    def rows(self) -> list[Answer]:
        """One for each process."""
        return [_answer(row) for row in self._ksmd.rows()]

    def files(self) -> dict[str, str]:
        """The contents of the files of /sys/kernel/mm/ksm. Scrapers ask for them ten times a second, so this does not
        go through `counters`."""
        return ksm_files.texts(self._ksmd.counters(), self._ksmd.get)

    def row(self, pid: int) -> Answer | None:
        """The row of one process; None if it has not joined. The number of pages merged with the zero page is up to
        date, unless ksmd is too busy to count within `RECOUNT_TIMEOUT`."""
        row = self._row(pid)
        if row is not None and row.ksm_zero_pages:
            for slot in self._ksmd.slots(pid)[-1:]:
                done = threading.Event()
                self._recounts.put((slot, done))
                self._wake.set()
                done.wait(RECOUNT_TIMEOUT)
            row = self._row(pid)
        return _answer(row) if row is not None else None

    def _row(self, pid: int) -> ProcessRow | None:
        return next((row for row in reversed(self._ksmd.rows()) if row.pid == pid), None)

    def _recount(self) -> None:
        """Count zero pages in ksmd's thread, so that a caller who asks for the row of a hanging process need not wait
        for it."""
        while not self._recounts.empty():
            slot, done = self._recounts.get()
            self._ksmd.recount_zeros(slot)
            done.set()
            self._hang_up_on_the_gone()

    def pids(self) -> list[int]:
        """The pids of all processes."""
        return [row.pid for row in self._ksmd.rows()]

    def commitments(self) -> list[Answer]:
        """The rows of all processes with their memory cgroup and the bytes available there, as they say now."""
        slots = self._ksmd.slots()
        found = self._available(slots)
        states = {slot.pid: slot.space.halted() for slot in slots}
        rows = self.rows()
        for row in rows:
            group, available = found.get(row["pid"]) or ("", 0)
            row |= {"cgroup": group, "bytes_available": available}
            if row["pid"] in states and row["state"] != SILENT:  # which ksmd may not have noticed yet
                row["state"] = states[row["pid"]] or "running"
        return rows

    def _available(self, slots: list[MmSlot]) -> dict[int, tuple[str, int] | None]:
        """The memory cgroup and the bytes available there, by pid, for the processes that answer in time."""
        try:
            asked = {slot.pid: self._status.submit(_headroom, slot) for slot in slots}
        except RuntimeError:  # no thread to be had
            return {slot.pid: _headroom(slot) for slot in slots}
        wait(asked.values(), STATUS_TIMEOUT)
        for answer in asked.values():
            answer.cancel()  # if its turn has not come
        return {pid: answer.result() for pid, answer in asked.items() if answer.done() and not answer.cancelled()}

    def knobs(self) -> dict[str, str]:
        """All of them."""
        return self._ksmd.knobs()

    def get(self, knob: str) -> str:
        """OSError EINVAL when there is no such knob."""
        with self._known(knob):
            return self._ksmd.get(knob)

    def set(self, knob: str, value: str, cancelled: Cancelled = lambda: False) -> None:
        """OSError: EINVAL, EBUSY, EINTR when `cancelled()` said so; for `run` = 2 also ENOMEM, EFAULT or ETIMEDOUT (see
        `Ksmd.unmerge`), with the numbers in its text; `run` is 0 then."""
        try:
            with hold(self._gate, cancelled), self._known(knob):
                merged = [row for row in self._ksmd.rows() if row.merged and (knob, value) == ("run", "2")]
                self._ksmd.set(knob, value, cancelled)
            for row in merged:
                self.tally.unmerged(row.pid, row.domain, DONE)
        except UnmergeFailed as e:
            result = e.result
            self._count(result, {row.pid: row.domain for row in self._ksmd.rows()})
            slots = self._ksmd.slots()
            known = {slot.pid for slot in slots}
            left = sum(slot.merged for slot in slots)
            lost = [row for row in result.processes if row.errno == errno.ETIMEDOUT and row.pid not in known]
            left += sum(row.pages_remaining for row in lost)
            why = agent.UNSEEN if result.unseen else ""
            if not why and result.errno == errno.ENOMEM:
                why = f"{left * PAGE_SIZE} bytes needed, {result.bytes_available} available"
            raise not_unmerged(result.errno, result.pages_unmerged, left, why, _rows(result.processes)) from e
        finally:
            self._hang_up_on_the_gone()
            self._wake.set()

    def unmerge(self, pids: list[int], progress: Progress, cancelled: Cancelled) -> Answer:
        """Unmerge the processes `pids`, or all. `progress` is called after each. The first error ends it, except errors
        that concern one process alone: `failed` has a row for each such process.

        OSError ESRCH when one of `pids` has not joined.
        """
        total: Answer = {"errno": None, "pages_unmerged": 0, "pages_remaining": 0}
        total |= {"bytes_available": 0, "limits_unseen": False}
        failed: dict[int, ProcessBreak] = {}
        for slot in self._each(pids):
            result = self._unmerge(slot, cancelled)
            failed |= {row.pid: row for row in result.processes if row.errno}
            total["pages_unmerged"] += result.pages_unmerged
            total["pages_remaining"] += result.pages_remaining
            total |= {"bytes_available": result.bytes_available, "limits_unseen": result.unseen}
            progress({"pid": slot.pid} | _needing(total))
            if result.stops:
                total["errno"] = errno.errorcode[result.errno]
                total["pages_remaining"] += self._merged_after(slot, pids)
                break
        if total["errno"] is None:
            self._ksmd.mm_list.lost.owe(pids, Owed(*WHOLE, leave_alone=True))
        for row in self._ksmd.mm_list.lost.rows(pids):
            if row.pid not in failed:
                failed[row.pid] = row
                total["pages_remaining"] += row.pages_remaining
        if failed and total["errno"] is None:
            total["errno"] = errno.errorcode[next(iter(failed.values())).errno]
        return _needing(total) | {"failed": _rows(failed.values()), "ok": total["errno"] is None}

    def _unmerge(self, slot: MmSlot, cancelled: Cancelled) -> UnmergeResult:
        try:
            with hold(self._gate, cancelled):
                result = self._ksmd.unmerge(slot, cancelled=cancelled)
            self._count(result, {slot.pid: slot.domain.key})
            return result
        except InterruptedError:  # before its turn came
            return UnmergeResult(errno.EINTR, pages_remaining=slot.merged)
        finally:
            self._hang_up_on_the_gone()

    def _count(self, result: UnmergeResult, domains: dict[int, MergeDomain]) -> None:
        for row in result.processes:
            if row.pid in domains:
                outcome = errno.errorcode[row.errno] if row.errno else DONE
                self.tally.unmerged(row.pid, domains[row.pid], outcome)

    def merge(self, pid: int, vpn: int, npages: int, owner: str | None = None) -> Answer:
        """Merge pages of a process now. OSError ESRCH when it has not joined, is not of `owner`, or goes meanwhile."""
        slot = self._of_pid(pid)[-1]
        if owner not in (None, str(slot.space.owner)):
            raise ProcessLookupError(errno.ESRCH, f"process {pid} has not joined")
        with self._gate:
            outcome = self._ksmd.merge_range(slot, vpn, npages)
        self._hang_up_on_the_gone()
        return asdict(outcome)

    def _of_pid(self, pid: int) -> list[MmSlot]:
        slots = self._ksmd.slots(pid)
        if not slots:
            raise ProcessLookupError(errno.ESRCH, f"process {pid} has not joined")
        return slots

    def _each(self, pids: list[int]) -> Iterator[MmSlot]:
        """The processes asked for, or all, those included that join meanwhile."""
        if pids:
            lost = {row.pid for row in self._ksmd.mm_list.lost.rows(pids)}
            yield from [slot for pid in pids if pid not in lost for slot in self._of_pid(pid)]
            return
        last = 0
        while slot := next((s for s in self._ksmd.slots() if s.number > last), None):
            last = slot.number
            yield slot

    def _merged_after(self, slot: MmSlot, pids: list[int]) -> int:
        """Merged pages of those asked for that come after `slot` and were not tried any more."""
        return sum(s.merged for s in self._ksmd.slots() if s.number > slot.number and (not pids or s.pid in pids))

    @contextlib.contextmanager
    def _known(self, knob: str) -> Iterator[None]:
        """Turn ksmd's errors about a knob into OSErrors whose `strerror` says everything."""
        try:
            yield
        except KeyError:
            names = ", ".join(self._ksmd.knobs())
            raise OSError(errno.EINVAL, f"no knob {knob}; there are {names}") from None
        except UnmergeFailed:
            raise
        except OSError as e:
            about = f": {e.filename}" if e.filename else ""
            raise OSError(e.errno, f"{e.strerror}{about}") from e

    def _hang_up_on_the_gone(self) -> None:
        """Disconnect the processes that ksmd gave up, for nonsense that the wire did not notice, say. The server drops
        a process when it sees that."""
        with self._slots_lock:
            gone = [(space, slot.lost) for space, slot in self._slots.items() if slot.gone]
        for space, why in gone:
            space.hang_up(why)

    def _pause(self, seconds: float) -> bool:
        """Returns True if it was woken early."""
        woken = self._stopping or self._wake.wait(None if seconds == float("inf") else seconds)
        self._wake.clear()
        return woken
