"""What merging needs to know besides the domain, and what it counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from samepage.arrays import Ints
from samepage.ksmd.mm_slot import MmSlot
from samepage.memory import AddressSpaceSilent, PageStatus

Concurrently = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""Like `map`: the service gives that of a thread pool, so that processes work at the same time."""


@dataclass(slots=True)
class _Failed:
    why: Exception


@dataclass(slots=True)
class MergeWork:
    """One for the life of a ksmd."""

    concurrently: Concurrently
    max_page_sharing: int = 256
    use_zero_pages: bool = True
    smart_scan: bool = True
    """What failed is tried again after ever more passes; else after one."""
    allowance: dict[str, int] | None = None
    """Pages that may still be merged, by memory cgroup; None: no limit (max_overcommit)."""
    passes: int = 0
    wary: bool = False
    """A process is silent. There may be more (of a frozen cgroup, say), and finding that out by asking takes a tenth of
    a second. So look at each process before asking it anything."""
    ends: float = math.inf
    """When nothing more of this slice is asked of any process, in `time.monotonic`: the rest is tried again."""
    statuses: Ints = field(default_factory=lambda: np.zeros(len(PageStatus), np.int64))

    def each(self, slots: Iterable[MmSlot], work: Callable[[MmSlot], Any]) -> dict[MmSlot, Any]:
        """Do something with several processes at the same time. Those that turn out to be gone are marked, and missing
        from the outcome. So are those for which `work` fails by a defect of ksmd's; the others are served on."""
        present = [slot for slot in slots if not slot.is_away]

        def attempt(slot: MmSlot) -> Any:
            try:
                if self.wary and (halted := slot.space.halted()):
                    raise AddressSpaceSilent(slot.pid, halted)
                return work(slot)
            except Exception as e:
                self.wary |= isinstance(e, AddressSpaceSilent)
                return _Failed(e)

        outcome = {}
        at_once = self.concurrently if len(present) > 1 else map  # one alone is not worth another thread
        for slot, result in zip(present, at_once(attempt, present), strict=True):
            if isinstance(result, _Failed):
                slot.lose(result.why)
            else:
                outcome[slot] = result
        return outcome
