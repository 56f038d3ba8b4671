"""The standard streams, whatever has become of them: closed, full, or with nobody at the other end."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from samepage.service.log import log

_AGAINST = (os.O_WRONLY, os.O_RDONLY, os.O_RDONLY)


def occupy() -> None:
    """Take the numbers of standard streams that are closed, so that no socket of ours gets one and is taken for one.

    To be called before anything is opened. Not inherited: what this process executes finds them closed. Each is open
    the wrong way round, so that what is printed to it fails instead of being lost.
    """
    for fd, flags in enumerate(_AGAINST):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, flags)  # gets the lowest number that is free
    # Python has None where it found a stream closed.
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def say(message: str) -> None:
    """One line on stderr. When it does not get there, there is nobody to tell."""
    log(message)


def flush() -> OSError | None:
    """Write out what was printed; returns why stdout could not be. Then nothing is left that could fail at exit."""
    failure = _flush(sys.stdout)
    _flush(sys.stderr)
    return failure


def _flush(stream: TextIO) -> OSError | None:
    try:
        stream.flush()
    except OSError as e:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        return OSError(e.errno, e.strerror, "standard output")
    return None
