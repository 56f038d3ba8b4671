"""The kernel's own KSM (/sys/kernel/mm/ksm), borrowed by a benchmark or a test, and put back as it was.

There is one of it in the machine. So whoever borrows it holds a lock, and waits while somebody else has it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

KSM = Path("/sys/kernel/mm/ksm")

FASTEST = {"advisor_mode": "none", "pages_to_scan": "10000000", "sleep_millisecs": "0"}
"""ksmd as fast as it can be made to scan."""

UNMERGED_ONLY = ("max_page_sharing", "merge_across_nodes")
"""Knobs that the kernel takes (else EBUSY) only when nothing is merged."""


def available() -> bool:
    """Whether this kernel has KSM, and this user may set it."""
    return os.access(KSM / "run", os.W_OK)


def read(name: str) -> int:
    """A counter or a knob, as a number."""
    return int((KSM / name).read_text())


def write(name: str, value: int | str) -> None:
    """Set a knob. OSError as the kernel has it. `run` = 2 comes back when everything is unmerged."""
    (KSM / name).write_text(str(value))


def merging_pages(pid: int) -> int:
    """Pages of a process that the kernel has merged, those with the zero page left out."""
    return int(Path(f"/proc/{pid}/ksm_merging_pages").read_text())


@contextlib.contextmanager
def borrowed(**knobs: int | str) -> Iterator[None]:
    """Set `knobs`, then `run` to 1 unless they say otherwise. At the end every knob is put back as it was.

    Waits until nobody else has it borrowed.
    """
    with (KSM / "run").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = _writable()
        wanted = {"run": 1} | knobs
        try:
            _set({name: str(value) for name, value in wanted.items()}, before)
            yield
        finally:
            _set(before, _writable())


def _writable() -> dict[str, str]:
    knobs = {p.name: p.read_text().strip() for p in KSM.iterdir() if p.stat().st_mode & 0o200}
    mode = knobs.get("advisor_mode", "")
    if "[" in mode:  # shown as: [none] scan-time
        knobs["advisor_mode"] = mode.partition("[")[2].partition("]")[0]
    return knobs


def _set(wanted: dict[str, str], now: dict[str, str]) -> None:
    changes = {name: value for name, value in wanted.items() if now.get(name) != value and name != "run"}
    if any(name in changes for name in UNMERGED_ONLY):
        write("run", 2)
    # pages_to_scan cannot be written while the advisor sets it: an advisor goes first, and comes last.
    if changes.get("advisor_mode") == "none":
        write("advisor_mode", changes.pop("advisor_mode"))
    for name in sorted(changes, key="advisor_mode".__eq__):
        write(name, changes[name])
    write("run", wanted["run"])
