"""How long is long: an emulated machine is as many times as slow."""

from __future__ import annotations

import time
from collections.abc import Callable


def slowness() -> float:
    """How many times as long as on a machine of 2025 something takes here, at least once."""
    began = time.monotonic()
    sum(i * i for i in range(300_000))
    return max(1.0, (time.monotonic() - began) / 0.02)


SLOW = slowness()


class WrongError(Exception):
    """What a check found."""


def must(true: object, otherwise: object) -> None:
    if not true:
        raise WrongError(otherwise)


def until(what: str, true: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for it, the longer the slower the machine: also if it became slower since."""
    began = time.monotonic()
    while not true():
        waited = time.monotonic() - began
        must(waited < seconds * SLOW or waited < seconds * slowness(), f"not in {waited:.0f} seconds: {what}")
        time.sleep(0.5)
