"""How much of the service's memory what is known of one user's processes may take.

A user has as many merge domains as user namespaces, so what is counted is counted for the user, over all of them. The
ids of others may be at hand, too (subuid(5)); so all users but the owner of the service have a limit together, twice as
high.
"""

from __future__ import annotations

import os
import weakref

AREAS_MAX = 1 << 20
"""Areas of all processes of one user."""

RESIDENT_MAX = 4 * 9 * os.sysconf("SC_PHYS_PAGES")
"""Bytes that the known pages of one user, and finding them, may take, or no new ones are known: 9 for each, were every
page of the machine in four processes. Whoever makes processes up must not fill the service's memory."""


class Quota:
    """What one user's domains hold, of `shares` times the limits. It is held of `common`, too."""

    def __init__(self, shares: int = 1, common: Quota | None = None) -> None:
        self._shares, self._common = shares, common
        self.nbytes = self.areas = 0

    def hold(self, nbytes: int, areas: int) -> None:
        """Somebody holds so much more, or less."""
        self.nbytes += nbytes
        self.areas += areas
        if self._common is not None:
            self._common.hold(nbytes, areas)

    @property
    def is_full(self) -> bool:
        """Whether no page is to be known that was not yet."""
        full = self.nbytes > self._shares * RESIDENT_MAX
        return full or (self._common is not None and self._common.is_full)

    def has_room(self, areas: int) -> bool:
        """Whether there may be so many areas more."""
        room = self.areas + areas <= self._shares * AREAS_MAX
        return room and (self._common is None or self._common.has_room(areas))


class Quotas:
    """The quotas of users, as long as they have domains. `owner`: whose service it is; None: it has no other users."""

    def __init__(self, owner: int | None) -> None:
        self._owner = owner
        self._of_all_others = Quota(shares=2)
        self._by_user: weakref.WeakValueDictionary[int, Quota] = weakref.WeakValueDictionary()

    def of(self, user: int) -> Quota:
        """That of a user."""
        quota = self._by_user.get(user)
        if quota is None:
            quota = Quota(common=None if self._owner in (None, user) else self._of_all_others)
            self._by_user[user] = quota
        return quota
