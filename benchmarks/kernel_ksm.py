"""The kernel's own KSM (/sys/kernel/mm/ksm), borrowed by a benchmark or a test, and put back as it was.

There is one of it in the machine. So whoever borrows it holds a lock, and waits while somebody else has it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

KSM = Path("/sys/kernel/mm/ksm")

FASTEST = {"advisor_mode": "none", "pages_to_scan": "10000000", "sleep_millisecs": "0"}
"""ksmd as fast as it can be made to scan."""

DEFAULTS = {
    "advisor_mode": "none",
    "pages_to_scan": "100",
    "sleep_millisecs": "20",
    "max_page_sharing": "256",
    "merge_across_nodes": "1",
    "use_zero_pages": "0",
    "smart_scan": "1",
}
"""How the kernel comes (mm/ksm.c of 6.18)."""

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


def counters() -> dict[str, int]:
    """All that it counts, by name."""
    return {p.name: int(p.read_text()) for p in KSM.iterdir() if not p.stat().st_mode & 0o200}


def ksmd() -> int:
    """The pid of the kernel thread."""
    for comm in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if comm.read_text() == "ksmd\n" and not (comm.parent / "maps").read_text():
                return int(comm.parent.name)
    raise FileNotFoundError(errno.ENOENT, "there is no ksmd")


def merging_pages(pid: int) -> int:
    """Pages of a process that the kernel has merged, those with the zero page left out."""
    return int(Path(f"/proc/{pid}/ksm_merging_pages").read_text())


def in_use() -> bool:
    """Whether somebody has it borrowed."""
    with (KSM / "run").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextlib.contextmanager
def borrowed(**knobs: int | str) -> Iterator[None]:
    """Set `knobs`, then `run` to 1 unless they say otherwise. At the end every knob is put back as it was.

    Waits until nobody else has it borrowed.
    """
    with (KSM / "run").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = _writable()
        try:
            set_knobs(**knobs)
            yield
        finally:
            _set(before, _writable())


def set_knobs(**knobs: int | str) -> None:
    """Set knobs while it is borrowed, and `run` to 1 unless they say otherwise."""
    _set({name: str(value) for name, value in ({"run": 1} | knobs).items()}, _writable())


def _writable() -> dict[str, str]:
    knobs = {p.name: p.read_text().strip() for p in KSM.iterdir() if p.stat().st_mode & 0o200}
    mode = knobs.get("advisor_mode", "")
    if "[" in mode:  # shown as: [none] scan-time
        knobs["advisor_mode"] = mode.partition("[")[2].partition("]")[0]
    return knobs


def _set(wanted: dict[str, str], now: dict[str, str]) -> None:
    # What this kernel has no knob for (advisor_mode before 6.8, smart_scan before 6.7) is off.
    changes = {name: value for name, value in wanted.items() if now.get(name, value) != value and name != "run"}
    if any(name in changes for name in UNMERGED_ONLY):
        write("run", 2)
    # pages_to_scan cannot be written while the advisor sets it: an advisor goes first, and comes last.
    if changes.get("advisor_mode") == "none":
        write("advisor_mode", changes.pop("advisor_mode"))
    for name in sorted(changes, key="advisor_mode".__eq__):
        write(name, changes[name])
    write("run", wanted["run"])
