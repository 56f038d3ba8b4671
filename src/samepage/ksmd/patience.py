"""How long ksmd lets itself be kept waiting, with its mutex held, by one process and by all of a merge domain.

An answer may take a moment, or longer if it is much work. The time beyond that is taken off an account, which fills up
again. A process whose account is empty is put off until then, since on a busy machine an honest process is slow, too.
A process that owes as much again is dropped. It may join again, and so may others like it, in any number of user
namespaces. So their user has an account as well, and while that is empty all of the user's processes are put off. A
user may have the ids of others at hand (subuid(5)); so all users but the owner of the service share one account. They
can hold up the others for some seconds, and then for a small part of the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable

A_MOMENT = 0.1
"""How long an answer may take, or taking it in, before the process is charged for it, in seconds."""


class Patience:
    """An account of seconds: `most` at the start, and at most; `regain` of every second comes back. What is spent of it
    is spent of `common`, too."""

    def __init__(
        self,
        most: float,
        regain: float,
        clock: Callable[[], float] = time.monotonic,
        common: Patience | None = None,
    ) -> None:
        self._most, self._regain, self._clock, self._common = most, regain, clock, common
        self._left = most
        self._at = clock()

    def spend(self, seconds: float) -> None:
        """Note how long ksmd waited."""
        self._left = self._filled() - seconds
        if self._common is not None:
            self._common.spend(seconds)

    @property
    def is_spent(self) -> bool:
        """Whether nothing is left."""
        spent = self._left <= 0 and self._filled() <= 0
        return spent or (self._common is not None and self._common.is_spent)

    @property
    def is_full(self) -> bool:
        """Whether it is as full as if ksmd had never waited."""
        return self._filled() >= self._most

    @property
    def is_at_an_end(self) -> bool:
        """Whether as much is owed as there was."""
        return self._left <= -self._most and self._filled() <= -self._most

    def _filled(self) -> float:
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._at) * self._regain)
        self._at = now
        return self._left


class Accounts:
    """The accounts of users. `owner`: the user who runs the service; None: it has no other users."""

    FORGET = 1000

    def __init__(self, owner: int | None) -> None:
        self._owner = owner
        self._of_all_others = Patience(most=10.0, regain=0.25)
        self._by_user: dict[int, Patience] = {}

    def is_foreign(self, user: int) -> bool:
        """Whether it is a user other than the service's owner."""
        return self._owner not in (None, user)

    def of(self, user: int) -> Patience:
        """The account of a user. It outlives the user's processes."""
        if len(self._by_user) > self.FORGET:
            self._by_user = {user: account for user, account in self._by_user.items() if not account.is_full}
        if user not in self._by_user:
            common = self._of_all_others if self.is_foreign(user) else None
            self._by_user[user] = Patience(most=30.0, regain=0.05, common=common)
        return self._by_user[user]
