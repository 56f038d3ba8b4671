"""The knobs of /sys/kernel/mm/ksm, with the kernel's names, meanings and errors."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass, field, fields
from enum import Enum, IntEnum
from typing import Any


class Run(IntEnum):
    """What `run` can be set to."""

    STOP = 0
    MERGE = 1
    UNMERGE = 2


class Format(Enum):
    """How the kernel reads what is written to the file of a knob (`samepage.service.ksm_files`)."""

    UINT = "a u32; whatever is wrong with it is EINVAL"
    ULONG = "a u64; whatever is wrong with it is EINVAL"
    INT = "an int; ERANGE beyond that"
    ULONG_RANGE = "a u64; ERANGE beyond that"
    LOW_HALF = "a u64, of which the lower half is kept"
    SWITCH = "kstrtobool(): 1, y, on, true, and so on"
    WORD = "a word"


@dataclass(frozen=True, slots=True)
class Knob:
    """Everything about a knob: files, commands, their help and errors are derived from this."""

    name: str
    default: str | int
    allowed: tuple[int, int] | tuple[str, ...]
    """The least and the greatest number, or the allowed words."""
    format: Format | None
    """The format of its file; None: it is samepage's alone, and has no file."""
    help: str

    @property
    def range(self) -> str:
        """The values it takes, in words."""
        if isinstance(self.allowed[0], int):
            return f"{self.allowed[0]}..{self.allowed[1]}"
        return "|".join(str(word) for word in self.allowed)

    def parse(self, value: str | int) -> str | int:
        """The value that a text stands for. Raises OSError EINVAL if there is none."""
        if isinstance(self.allowed[0], str):
            if value not in self.allowed:
                raise error(errno.EINVAL, f"{self.name}: {value!r} is not one of {self.range}")
            return value
        if isinstance(value, str) and not re.fullmatch("[+-]?[0-9]+", value):  # int() takes 1_000, too
            raise error(errno.EINVAL, f"{self.name}: {value!r} is no number")
        number = int(value)
        low, high = self.allowed
        if not int(low) <= number <= int(high):
            raise error(errno.EINVAL, f"{self.name}: {number} is not in {self.range}")
        return number


def _knob(default: Any, allowed: tuple[Any, ...], file: Format | None, text: str) -> Any:
    return field(default=default, metadata={"allowed": allowed, "format": file, "help": text})


_U32, _U64 = (1 << 32) - 1, (1 << 64) - 1


@dataclass(slots=True)
class Knobs:
    """Their values; the defaults are the kernel's but for `use_zero_pages` and the advisor, the limits those of
    mm/ksm.c (6.18).

    Pages of zeros are merged with the zero page by default (the kernel does not): here that costs no mapping
    and no segment, so there is nothing to be weighed against it.
    """

    run: int = _knob(Run.MERGE, (0, 2), Format.UINT, "0: merge nothing more, 1: merge, 2: unmerge everything, and stop")
    pages_to_scan: int = _knob(
        100, (0, _U32), Format.UINT, 'pages hashed in a batch if the advisor is "none"; "scan-time" sets it by itself'
    )
    sleep_millisecs: int = _knob(
        20,
        (0, _U32),
        Format.UINT,
        'milliseconds between batches; between passes at least, with the advisor "cpu"',
    )
    max_page_sharing: int = _knob(
        256, (2, (1 << 31) - 1), Format.INT, "pages that may share one copy; for more, a second copy is made"
    )
    use_zero_pages: int = _knob(1, (0, 1), Format.SWITCH, "1: pages of zeros become the kernel's zero page")
    smart_scan: int = _knob(
        1,
        (0, 1),
        Format.SWITCH,
        "1: pages not written since the last look are passed over, and what could not be merged is tried again ever "
        "more rarely; 0: everything is looked at and tried in every pass",
    )
    merge_across_nodes: int = _knob(
        1, (0, 1), Format.ULONG_RANGE, "0: only pages of the same NUMA node are merged, with a copy on that node"
    )
    stable_node_chains_prune_millisecs: int = _knob(
        2000, (0, _U32), Format.UINT, "how often copies are looked for that nobody needs, and given back"
    )
    max_overcommit: int = _knob(
        0,
        (0, _U32),
        None,
        "percent; in a memory cgroup nothing is merged if unmerging all of it would then take more than so many "
        "percent of what is available there; 0: no such limit",
    )
    advisor_mode: str = _knob(
        "cpu",
        ("none", "scan-time", "cpu"),
        Format.WORD,
        "what settles how much is looked at: pages_to_scan or an advisor",
    )
    advisor_max_cpu: int = _knob(
        2, (0, _U32), Format.LOW_HALF, "percent of a core that looking again at memory already seen may cost, in all"
    )
    advisor_target_scan_time: int = _knob(200, (1, _U64), Format.ULONG, 'seconds a pass is to take, for "scan-time"')
    advisor_min_pages_to_scan: int = _knob(500, (0, _U64), Format.ULONG, 'the least "scan-time" sets pages_to_scan to')
    advisor_max_pages_to_scan: int = _knob(30000, (0, _U64), Format.ULONG, "and the most")

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

KNOBS = {f.name: Knob(f.name, f.default, **f.metadata) for f in fields(Knobs)}  # type: ignore[arg-type]
"""All of them by name, in the order in which they are shown."""


def error(code: int, what: str) -> OSError:
    """An OSError with the errno's own text and what it is about."""
    return OSError(code, os.strerror(code), what)


def check_change(knobs: Knobs, name: str, value: str | int, merged: bool) -> None:
    """Raise the kernel's error if a value is valid, but not now."""
    if name in ("max_page_sharing", "merge_across_nodes") and value != getattr(knobs, name) and merged:
        raise error(errno.EBUSY, f"{name}: pages are merged; set run to 2 first")
    if name == "pages_to_scan" and knobs.advisor_mode == "scan-time":
        raise error(errno.EINVAL, "pages_to_scan: the advisor sets it; set advisor_mode to none first")
