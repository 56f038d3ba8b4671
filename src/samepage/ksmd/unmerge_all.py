"""Unmerging across processes (unmerge_and_remove_all_rmap_items): one after the other, to the first error.

A process that does not answer (it is stopped, say) does not stop the others. Its unmerge is *owed*, and done as soon as
it answers.
"""

from __future__ import annotations

import errno

from samepage.ksmd.mm_slot import WHOLE, MmSlot, Owed
from samepage.ksmd.passes import Passes
from samepage.ksmd.unmerge import Cancelled, ProcessBreak, UnmergeResult, unmerge_pages
from samepage.memory import AddressSpaceGone, AddressSpaceSilent


class Unmerging:
    """Unmerges ranges, processes, and everything. Everything is touched under `Ksmd.mutex` only."""

    def __init__(self, passes: Passes) -> None:
        self._passes, self._mm_list, self._work = passes, passes.mm_list, passes.work

    def unmerge(
        self, only: MmSlot | None, extent: tuple[int, int], cancelled: Cancelled, leave_alone: bool
    ) -> UnmergeResult:
        """See `Ksmd.unmerge`; `leave_alone` as in `unmerge_pages`."""
        mm_list = self._mm_list
        self.listen()
        result = UnmergeResult()
        slot = only or mm_list.after(0)
        while slot is not None:
            if not slot.gone:
                self._one(slot, Owed(*extent, leave_alone), cancelled, result)
            if result.stops:
                break
            slot = None if only else mm_list.after(slot.number)
        mm_list.reap()
        pids = [only.pid] if only else []
        if not result.stops:
            mm_list.lost.owe(pids, Owed(*extent, leave_alone))
        for row in mm_list.lost.rows(pids):
            result.add_lost(row)
        return result

    def everything(self, cancelled: Cancelled) -> UnmergeResult:
        """All of it (unmerge_and_remove_all_rmap_items). The cursor goes back to the head either way; `full_scans` is
        zero again only if there was no error."""
        result = self.unmerge(None, WHOLE, cancelled, leave_alone=False)
        self._mm_list.to_the_head()
        self._mm_list.reap()
        if not result.errno:
            self._passes.seqnr = 0
            for domain in self._mm_list.domains():
                domain.start_afresh()
        return result

    def listen(self) -> None:
        """Serve processes again that were silent and now answer, and do the unmerges that are owed to them."""
        slots = [slot for slot in self._mm_list.slots() if (slot.silent or slot.owed) and slot in slot.domain.slots]
        for slot in slots:
            try:
                if slot.silent:
                    self._passes.catch_up(slot)
                if not slot.silent and slot.owed:
                    owed, slot.owed = slot.owed, []
                    for one in owed:
                        self._one(slot, one, lambda: False, UnmergeResult())
            except AddressSpaceGone as e:
                slot.lose(e)
            except Exception as e:  # a defect that concerns one process must not keep ksmd from all others
                slot.lose(e)
                self._mm_list.mend()
        self._mm_list.reap()
        self._work.wary = any(slot.silent for slot in slots if not slot.gone)

    def _one(self, slot: MmSlot, asked: Owed, cancelled: Cancelled, result: UnmergeResult) -> None:
        if slot not in slot.domain.slots:  # joined this moment
            self._mm_list.reap()
        merged, extent = slot.merged, (asked.vpn, asked.npages)
        try:
            if not slot.silent and (halted := slot.space.halted()):
                slot.lose(AddressSpaceSilent(slot.pid, halted))
            if slot.silent:
                raise AddressSpaceSilent(slot.pid, slot.silent)
            with slot.space.interruptible(cancelled):
                row, last = unmerge_pages(
                    slot.domain, slot, *extent, cancelled, asked.leave_alone, self._work.concurrently
                )
        except AddressSpaceGone as e:
            slot.lose(e)
            result.pages_unmerged += max(0, merged - slot.merged)
            if cancelled():
                result.errno = errno.EINTR
            elif slot.silent:
                _owe(slot, asked, result)
            return
        result.add(row, last)
        slot.pending_breaks = [run for run in slot.pending_breaks if not _within(run, extent)]
        if row.errno in (errno.ENOMEM, errno.EFAULT) and asked.leave_alone:
            slot.pending_breaks.append(extent)


def _owe(slot: MmSlot, owed: Owed, result: UnmergeResult) -> None:
    """Owe a silent process its unmerge, which is done as soon as it answers. Nothing is owed to one that is known to
    have nothing merged."""
    if slot.passes and not slot.merged:
        return
    if owed not in slot.owed:
        slot.owed.append(owed)
    row = ProcessBreak(slot.pid, errno.ETIMEDOUT, 0, slot.merged, slot.comm, slot.silent)
    result.add_lost(row)


def _within(run: tuple[int, int], extent: tuple[int, int]) -> bool:
    return extent[0] <= run[0] and run[0] + run[1] <= extent[0] + extent[1]
