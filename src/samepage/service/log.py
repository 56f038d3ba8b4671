"""What a service logs: lines on stderr, but not the same one over and over."""

from __future__ import annotations

import contextlib
import os
import threading
import time

QUIET = 60.0
"""For so many seconds only the first line of a kind is logged."""

_lock = threading.Lock()
_said: dict[str, tuple[float, int]] = {}  # by kind: when it was last logged, and how many lines were left out since


def log(message: str) -> None:
    """Log one line on stderr."""
    # Not print(): what it could not write Python would write again at exit, and exit with 120.
    with contextlib.suppress(OSError):
        os.write(2, os.fsencode(f"samepage: {message}\n"))


def log_once(kind: str, message: str) -> None:
    """The same for lines that may come often. Of one kind the first is logged, and then one a minute, with the number
    of lines left out."""
    now = time.monotonic()
    with _lock:
        last, unsaid = _said.get(kind, (-QUIET, 0))
        if now - last < QUIET:
            _said[kind] = (last, unsaid + 1)
            return
        _said[kind] = (now, 0)
    log(f"{message} (and {unsaid} more like it before)" if unsaid else message)


def log_the_rest() -> None:
    """At the end, log how many lines of each kind were left out."""
    with _lock:
        rest = {kind: unsaid for kind, (_, unsaid) in _said.items() if unsaid}
        _said.clear()
    for kind, unsaid in rest.items():
        log(f"{kind}: {unsaid} more times")
