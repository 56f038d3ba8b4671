"""Processes that were lost: they have merged pages and run or are stopped, but cannot be asked anything.

An unmerge that does not reach one of them has not unmerged everything, and must not say so. What is known of such a
process stays here until it joins again, as an agent does by itself when its process goes on, or until it is gone.
"""

from __future__ import annotations

import errno
from collections.abc import Collection
from dataclasses import dataclass, field

from samepage.ksmd.mm_slot import MmSlot, Owed
from samepage.ksmd.unmerge import ProcessBreak
from samepage.memory import AddressSpace


@dataclass(slots=True)
class _Process:
    space: AddressSpace
    comm: str
    merged: int
    owed: list[Owed] = field(default_factory=list)


class Lost:
    """By pid. Any thread may call `forget`."""

    def __init__(self) -> None:
        self._processes: dict[int, _Process] = {}

    def note(self, slot: MmSlot) -> None:
        """A process whose slot is about to be dropped, with its pages still counted."""
        if slot.astray and (slot.merged or slot.owed):
            self._processes[slot.pid] = _Process(slot.space, slot.comm, slot.merged, slot.owed)

    def forget(self, pid: int) -> list[Owed]:
        """Forget a process that is back. Returns the unmerges that did not reach it."""
        process = self._processes.pop(pid, None)
        return process.owed if process is not None else []

    def owe(self, pids: Collection[int], owed: Owed) -> None:
        """Note that an unmerge did not reach those of `pids`, or all."""
        for pid, process in list(self._processes.items()):
            if (not pids or pid in pids) and owed not in process.owed:
                process.owed.append(owed)

    def merge_again(self) -> None:
        """Called when `run` is 1: what a `run` = 2 left undone need not be done any more."""
        for process in list(self._processes.values()):
            process.owed = [owed for owed in process.owed if owed.leave_alone]

    def rows(self, pids: Collection[int] = ()) -> list[ProcessBreak]:
        """A row for each of `pids`, or of all, that still exists: its merged pages were not unmerged."""
        for pid, process in list(self._processes.items()):
            if not process.space.is_there():
                self.forget(pid)
        return [
            ProcessBreak(pid, errno.ETIMEDOUT, 0, process.merged, process.comm)
            for pid, process in list(self._processes.items())
            if not pids or pid in pids
        ]
