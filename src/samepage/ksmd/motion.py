"""Whether a process is filling its memory, so that it is too early to look at it.

Programs build what they work on, and collect garbage, in memory that they map themselves. As long as pages arrive, most
looks are in vain: the page is written again, or is gone, and a short job ends before anything is merged. A collector
may go round in memory that it has already, which takes no page faults, but takes a CPU. So memory that nobody named
(`samepage run --memory`) is looked at once the process has come to rest for as long as it was in motion, but for a
second at most. A process that never rests is looked at when that takes no more than its share of the time.

Large allocations and MADV_MERGEABLE are like a request: such memory is looked at meanwhile, too, a few times a second.
"""

from __future__ import annotations

import math

PAGE_SECONDS = 3e-6
"""What a look costs for each page that was written since the last, the fault at the next write included."""

REST_LEAST, REST_MOST = 0.1, 1.0
"""The shortest and the longest rest to wait for, in seconds."""

MOST_SECONDS = 30.0
"""The longest time between two looks at a process that is always in motion."""

WORKS = 0.5
"""A process is in motion, too, when it takes more than this share of a CPU, over `REST_LEAST`."""

GLANCE_SECONDS = 0.1
"""The shortest time between two looks at the memory that was named, of a process in motion."""

INTERVAL = 0.01
"""The shortest time by which to tell how fast pages arrive."""


class Motion:
    """What is known of the page faults of one process, and of its CPU time. `now` is in seconds, of the clock given to
    `Ksmd`."""

    def __init__(self, now: float) -> None:
        self._looked, self._at_look = now, 0  # when it was last looked at, and its faults by then
        self._asked, self._faults = now, -1  # the same, when it was last asked for; -1: not yet
        self._glanced = -math.inf  # when its named memory was last looked at, and nothing else
        self._clocked, self._cpu = now, math.inf  # when its CPU time was last asked for, and what it was
        self._began = self._moved = now  # when it began to move, and when it was last seen to

    def is_due(self, now: float, faults: int, pages: int, cpu: float, share: float) -> bool:
        """Whether to look at it. It had so many `faults` so far, has so many `pages`, and took `cpu` seconds of CPU
        without its agent; `share` of the time may be spent on it."""
        if self._faults < 0:
            self._faults = faults
        elif now - self._asked >= INTERVAL:
            if (faults - self._faults) * PAGE_SECONDS > (now - self._asked) * share:
                self._moves(self._asked, now)
            self._asked, self._faults = now, faults
        if now - self._clocked >= REST_LEAST or self._cpu == math.inf:
            if cpu - self._cpu > (now - self._clocked) * WORKS:
                self._moves(self._clocked, now)
            self._clocked, self._cpu = now, cpu
        cost = min(faults - self._at_look, pages) * PAGE_SECONDS
        waited = now - self._looked
        return self._is_at_rest(now) or cost <= waited * share or waited >= MOST_SECONDS

    def _moves(self, since: float, now: float) -> None:
        if self._is_at_rest(since):
            self._began = since
        self._moved = now

    def _is_at_rest(self, now: float) -> bool:
        return now >= self.rests_at

    @property
    def rests_at(self) -> float:
        """From when on it is at rest, unless it moves again."""
        return self._moved + min(max(self._moved - self._began, REST_LEAST), REST_MOST)

    def is_glance_due(self, now: float) -> bool:
        """Whether to look at its named memory now; if so, it is noted."""
        is_due = now - self._glanced >= GLANCE_SECONDS
        if is_due:
            self._glanced = now
        return is_due

    def looked_at(self, now: float, faults: int) -> None:
        """Note that it is looked at now."""
        self._looked, self._at_look = now, faults
