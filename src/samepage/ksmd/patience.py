"""How long ksmd lets itself be kept waiting, with its mutex held, by one process and by all of a merge domain.

An answer may take a moment, and one that is much work longer. What goes beyond that is taken off an account, which
fills up again with time. A process whose account is empty is put off: where there is too much to do the best are slow.
One that owes as much again is dropped. It may join again, and so may its like; so their domain has an account as well,
and while that is empty the domain is put off. Together they hold up the others for some seconds, and then a small part
of the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable

A_MOMENT = 0.1
"""Seconds that one answer may take, or taking it in, before it costs anything."""


class Patience:
    """An account of seconds: `most` at the start, and at most; `regain` of every second comes back."""

    def __init__(self, most: float, regain: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._regain, self._clock = most, regain, clock
        self._left = most
        self._at = clock()

    def spend(self, seconds: float) -> None:
        """Somebody was waited for."""
        self._left = self._filled() - seconds

    @property
    def is_spent(self) -> bool:
        """Whether nothing is left."""
        return self._left <= 0 and self._filled() <= 0

    @property
    def is_at_an_end(self) -> bool:
        """Whether as much is owed as there was."""
        return self._left <= -self._most and self._filled() <= -self._most

    def _filled(self) -> float:
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._at) * self._regain)
        self._at = now
        return self._left
