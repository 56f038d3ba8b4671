"""How much of the service's memory the knowledge about one user's processes may take.

A user has as many merge domains as user namespaces, so the limits are for the user, over all domains. A user may also
control the ids of others (subuid(5)); so all users but the owner of the service have a common limit, twice as high.
"""

from __future__ import annotations

import os
import weakref

AREAS_MAX = 1 << 20
"""Areas of all processes of one user."""

RESIDENT_MAX = 4 * 9 * os.sysconf("SC_PHYS_PAGES")
"""The bytes that one user's known pages, and finding them, may take; beyond that no new pages are known. It is 9 bytes
for each page, if every page of the machine were in four processes. A user who invents processes must not fill the
service's memory."""


class Quota:
    """What one user's domains hold, of `shares` times the limits. It is held of `common`, too."""

    def __init__(self, shares: int = 1, common: Quota | None = None) -> None:
        self._shares, self._common = shares, common
        self.nbytes = self.areas = 0

    def hold(self, nbytes: int, areas: int) -> None:
        """Hold that much more, or less."""
        self.nbytes += nbytes
        self.areas += areas
        if self._common is not None:
            self._common.hold(nbytes, areas)

    @property
    def is_full(self) -> bool:
        """Whether no more pages may become known."""
        full = self.nbytes > self._shares * RESIDENT_MAX
        return full or (self._common is not None and self._common.is_full)

    def has_room(self, areas: int) -> bool:
        """Whether there may be that many more areas."""
        room = self.areas + areas <= self._shares * AREAS_MAX
        return room and (self._common is None or self._common.has_room(areas))


class Quotas:
    """The quotas of users, as long as they have domains. `owner`: whose service it is; None: it has no other users."""

    def __init__(self, owner: int | None) -> None:
        self._owner = owner
        self._of_all_others = Quota(shares=2)
        self._by_user: weakref.WeakValueDictionary[int, Quota] = weakref.WeakValueDictionary()

    def of(self, user: int) -> Quota:
        """The quota of a user."""
        quota = self._by_user.get(user)
        if quota is None:
            quota = Quota(common=None if self._owner in (None, user) else self._of_all_others)
            self._by_user[user] = quota
        return quota
