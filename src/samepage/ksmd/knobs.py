"""The knobs of /sys/kernel/mm/ksm, with the kernel's names, meanings and errors."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass, fields
from enum import IntEnum


class Run(IntEnum):
    """What `run` can be set to."""

    STOP = 0
    MERGE = 1
    UNMERGE = 2


ADVISOR_MODES = ("none", "scan-time", "cpu")


@dataclass(slots=True)
class Knobs:
    """Their values; the defaults are the kernel's but for `use_zero_pages` and the advisor.

    Pages of zeros are merged with the zero page by default (the kernel does not): here that costs no mapping
    and no segment, so there is nothing to be weighed against it.
    """

    run: int = Run.MERGE
    pages_to_scan: int = 100
    """Pages hashed in a batch when the advisor is "none" (or as "scan-time" found best)."""
    sleep_millisecs: int = 20
    """Milliseconds between batches; with the advisor "cpu", at least that between two passes."""
    max_page_sharing: int = 256
    """Pages that may be merged with one node; from the next on a second copy is made."""
    use_zero_pages: int = 1
    smart_scan: int = 1
    """Pages not written since the last look are passed over, and what could not be merged is tried again ever more
    rarely. 0: everything is looked at and tried in every pass."""
    merge_across_nodes: int = 1
    """0: only pages of the same NUMA node are merged, with a copy on that node."""
    stable_node_chains_prune_millisecs: int = 2000
    """How often segments are looked for that hold memory for nothing, and are given back."""
    max_overcommit: int = 0
    """Percent; 0 is off. Nothing is merged in a memory cgroup if what its processes would need, were all their merged
    pages written at once, is then more than so many percent of what it has available."""
    advisor_mode: str = "cpu"
    advisor_max_cpu: int = 2
    """Percent of one core that looking again at memory already seen may cost, ksmd and application together."""
    advisor_target_scan_time: int = 200
    """Seconds a pass is to take, in mode "scan-time"."""
    advisor_min_pages_to_scan: int = 500
    advisor_max_pages_to_scan: int = 30000

    # What a value comes to here. The kernel takes any number, and scripts put back what they found; so do we, and use
    # the nearest that makes sense.

    @property
    def sharing(self) -> int:
        """`max_page_sharing`, of which books are kept in 16 bits."""
        return min(self.max_page_sharing, SHARING_MAX)

    @property
    def cpu_share(self) -> float:
        """`advisor_max_cpu` as a share of a core: nothing is no share, and the advisor would wait for ever."""
        return min(max(self.advisor_max_cpu, 1), 100) / 100

    @property
    def advised_pages(self) -> tuple[int, int]:
        """The fewest and the most pages that the advisor may set. The maximum wins."""
        most = min(max(self.advisor_max_pages_to_scan, 1), _U32)
        return min(max(self.advisor_min_pages_to_scan, 1), most), most


SHARING_MAX = 32768

_U32, _U64 = (1 << 32) - 1, (1 << 64) - 1

# The kernel's (mm/ksm.c, 6.18).
_LIMITS = {
    "run": (0, 2),
    "pages_to_scan": (0, _U32),
    "sleep_millisecs": (0, _U32),
    "max_page_sharing": (2, (1 << 31) - 1),
    "use_zero_pages": (0, 1),
    "smart_scan": (0, 1),
    "merge_across_nodes": (0, 1),
    "stable_node_chains_prune_millisecs": (0, _U32),
    "max_overcommit": (0, _U32),
    "advisor_max_cpu": (0, _U32),
    "advisor_target_scan_time": (1, _U64),
    "advisor_min_pages_to_scan": (0, _U64),
    "advisor_max_pages_to_scan": (0, _U64),
}

NAMES = tuple(f.name for f in fields(Knobs))
"""All knobs, in the order they are shown."""


def error(code: int, what: str) -> OSError:
    """An OSError with the errno's own text and what it is about."""
    return OSError(code, os.strerror(code), what)


def parse(name: str, value: str | int) -> str | int:
    """The value a knob would get. KeyError: no such knob; OSError EINVAL: no such value."""
    if name not in NAMES:
        raise KeyError(name)
    if name == "advisor_mode":
        if value not in ADVISOR_MODES:
            raise error(errno.EINVAL, f"{name}: {value!r}")
        return value
    if isinstance(value, str) and not re.fullmatch("[+-]?[0-9]+", value):  # int() takes 1_000, too
        raise error(errno.EINVAL, f"{name}: {value!r}")
    number = int(value)
    low, high = _LIMITS[name]
    if not low <= number <= high:
        raise error(errno.EINVAL, f"{name}: {number} is not in {low}..{high}")
    return number


def check_change(knobs: Knobs, name: str, value: str | int, merged: bool) -> None:
    """Raise the kernel's error where a value is good but not now."""
    if name in ("max_page_sharing", "merge_across_nodes") and value != getattr(knobs, name) and merged:
        raise error(errno.EBUSY, f"{name}: pages are merged; set run to 2 first")
    if name == "pages_to_scan" and knobs.advisor_mode == "scan-time":
        raise error(errno.EINVAL, "pages_to_scan: the advisor sets it; set advisor_mode to none first")
