"""The boundary of sharing: pages are compared with, and mapped from, those of the same merge domain only."""

from __future__ import annotations

from dataclasses import dataclass

SEVERAL = -1
"""The `user` of a domain that a policy opened across users. No user has that id."""


@dataclass(frozen=True, slots=True)
class MergeDomain:
    """Who may share pages with one another. Two processes are in one domain if all of this is equal."""

    user: int
    """User id, or `SEVERAL`. What the domain costs the service is charged to that user."""
    userns: int = 0
    """Inode of the user namespace; 0: that of the service, or any (if a policy says so)."""
    container: int = 0
    """Inode of the PID namespace; 0: that of the service, or any (if a policy says so)."""
    name: str = ""
    """Given by a policy, or asked for by `--domain`."""
    zero_only: bool = False
    """Only pages of zeros are merged, with the kernel's zero page: nothing is shared with anybody."""

    def __str__(self) -> str:
        """Different for different domains: users compare these in `samepage status`."""
        parts = [self.name] if self.name else []
        if self.user != SEVERAL:
            parts.append(f"user={self.user}" if self.name else str(self.user))
        if self.userns:
            parts.append(f"userns={self.userns}")
        if self.container:
            parts.append(f"container={self.container}")
        if self.zero_only:
            parts.append("zero-only")
        return ",".join(parts)
