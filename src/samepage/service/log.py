"""What a service says: lines on stderr, and not the same thing over and over."""

from __future__ import annotations

import contextlib
import sys
import threading
import time

QUIET = 60.0
"""Seconds in which only the first line of a kind is said."""

_lock = threading.Lock()
_said: dict[str, tuple[float, int]] = {}  # by kind: when it was said last, and how many were not said since


def log(message: str) -> None:
    """One line on stderr."""
    with contextlib.suppress(OSError, ValueError):
        print(f"samepage: {message}", file=sys.stderr, flush=True)


def log_once(kind: str, message: str) -> None:
    """The same, but for lines of which many may come. Of one kind the first is said, and then one a minute, with the
    number of those that were not."""
    now = time.monotonic()
    with _lock:
        last, unsaid = _said.get(kind, (-QUIET, 0))
        if now - last < QUIET:
            _said[kind] = (last, unsaid + 1)
            return
        _said[kind] = (now, 0)
    log(f"{message} (and {unsaid} more like it before)" if unsaid else message)


def log_the_rest() -> None:
    """At the end: how many of each kind were not said."""
    with _lock:
        rest = {kind: unsaid for kind, (_, unsaid) in _said.items() if unsaid}
        _said.clear()
    for kind, unsaid in rest.items():
        log(f"{kind}: {unsaid} more times")
