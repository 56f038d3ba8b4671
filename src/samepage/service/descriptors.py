"""What the descriptors of a service are spent on. There are as many as the hard limit allows, and each kind has a
share, so that none can use up what the others need."""

from __future__ import annotations

import resource
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shares:
    """How many descriptors there may be at most: of processes that joined, of connections that shake hands or ask
    something, of segments."""

    limit: int
    processes: int
    connections: int
    segments: int


def shares() -> Shares:
    """By the limit as it is now. An eighth, or 64, is for everything else, and for what is just being opened."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    rest = limit - min(64, limit // 8)
    processes, connections = rest // 2, rest // 8
    return Shares(limit, processes, connections, rest - processes - connections)


def raise_descriptor_limit() -> None:
    """Let this process open as many descriptors as it may: one for each process, one for each segment."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
