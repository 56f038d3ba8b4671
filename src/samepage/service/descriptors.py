"""How a service divides its descriptors.

There are as many as the hard limit allows. Each kind has a share, so that no kind can use up what the others need."""

from __future__ import annotations

import resource
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shares:
    """The most descriptors of each kind: for processes that joined, for connections that shake hands or ask something,
    and for segments."""

    limit: int
    processes: int
    connections: int
    segments: int


def shares() -> Shares:
    """The shares under the present limit. An eighth, or 64, is left for everything else, and for what is just being
    opened."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    rest = limit - min(64, limit // 8)
    processes, connections = rest // 2, rest // 8
    return Shares(limit, processes, connections, rest - processes - connections)


def raise_descriptor_limit() -> None:
    """Let this process open as many descriptors as it may: it needs one for each process and one for each segment."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
