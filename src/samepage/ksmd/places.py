"""Whether processes still are who they were, and in the merge domain where they belong.

A process that now belongs elsewhere (it was moved to another cgroup, or the policy changed) takes nothing along: before
ksmd lets it go, what it shares is unmerged, as far as there is memory for that. It joins again by itself, where it
belongs.
"""

from __future__ import annotations

import errno
import math

from samepage.ksmd.domain import Domain
from samepage.ksmd.mm_slot import WHOLE, MmSlot, Owed
from samepage.ksmd.passes import Passes
from samepage.ksmd.unmerge_all import Unmerging
from samepage.memory import AddressSpaceGone

VERIFY_SECONDS = 1.0
"""Before pages are matched, ksmd looks whether their processes still are who they were, but at each no more often than
this: it takes 50 microseconds."""

PLACE_SECONDS = 10.0
"""How often ksmd looks whether a process is where it belongs, even when there is nothing to match."""

UNMERGE_SECONDS = 1.0
"""How long processes that leave are unmerged at a time: others want something, too."""


class Places:
    """Everything is touched under `Ksmd.mutex` only, but `look_again`."""

    def __init__(self, passes: Passes, unmerging: Unmerging) -> None:
        self._mm_list, self._unmerging, self._clock = passes.mm_list, unmerging, passes.clock

    def verify(self, domain: Domain) -> None:
        """Call this before pages of a domain are matched. Drops the processes that are not who they were (they have
        another user, say); nothing is merged in those that belong elsewhere."""
        now = self._clock()
        for slot in list(domain.slots):
            if now - slot.verified < VERIFY_SECONDS or slot.gone:
                continue
            try:
                slot.space.verify()
            except AddressSpaceGone as e:
                slot.lose(e)
                continue
            slot.verified = now
            self._look_at(slot, now)
        self._mm_list.reap()

    def look(self) -> None:
        """Look at all of them now and then, and see off those that leave, for a while."""
        now = self._clock()
        for slot in self._mm_list.slots():
            if now - slot.placed >= PLACE_SECONDS:
                self._look_at(slot, now)
        for slot in [slot for slot in self._mm_list.slots() if slot.leaving and not slot.silent]:
            if self._clock() >= now + UNMERGE_SECONDS:
                break
            self._see_off(slot, now + UNMERGE_SECONDS)
        self._mm_list.reap()

    def look_again(self) -> None:
        """Look at all of them the next time, because the rules have changed. From any thread."""
        for slot in self._mm_list.slots():
            slot.placed = -math.inf

    def _look_at(self, slot: MmSlot, now: float) -> None:
        slot.placed = now
        try:
            slot.leaving = slot.space.misplaced()
        except OSError:
            pass  # it has ended, and will be noticed to have
        except Exception as e:  # a mistake that is about one process must not keep ksmd from all others
            slot.lose(e)

    def _see_off(self, slot: MmSlot, ends: float) -> None:
        result = self._unmerging.unmerge(slot, WHOLE, lambda: self._clock() >= ends, leave_alone=False)
        if slot.gone or slot.silent or result.errno == errno.EINTR:
            return
        why = slot.leaving
        if result.errno:
            slot.owed.append(Owed(*WHOLE, leave_alone=True))
            why += f"; {result.pages_remaining} of its pages stay merged: {errno.errorcode[result.errno]}"
        slot.lose(AddressSpaceGone(why))
