"""The files of /sys/kernel/mm/ksm and of /proc/PID: what they show, and what may be written to them.

Names, modes, formats and errors are those of Linux 6.18 (mm/ksm.c; Documentation/admin-guide/mm/ksm.rst; kstrtox.c).
What was read from a file can be written back to it.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from samepage.ksmd.knobs import KNOBS, Format

Parse = Callable[[str], str]
"""Turns what was written into the value of a knob. OSError EINVAL or ERANGE, as the kernel has it."""

_U32, _U64 = (1 << 32) - 1, (1 << 64) - 1


def _number(text: str, low: int, high: int) -> int:
    """kstrtoull() and kstrtoll() for base 10: digits, perhaps a sign before and a newline after, and nothing else."""
    match = re.match(r"\+?([0-9]+)" if low == 0 else r"(?:\+?|-)([0-9]+)", text)
    if match is None:
        raise OSError(errno.EINVAL, f"not a number: {text[:40]!r}")
    magnitude = int(match[1])
    rest = text[match.end() :]
    if magnitude <= _U64 and rest not in ("", "\n"):
        raise OSError(errno.EINVAL, f"not a number: {text[:40]!r}")
    value = -magnitude if text.startswith("-") else magnitude
    if not low <= value <= high:
        raise OSError(errno.ERANGE, f"out of range: {text[:40]!r}")
    return value


def _strictly(low: int, high: int) -> Parse:
    """A number, whose errors the kernel hands on as they are."""
    return lambda text: str(_number(text, low, high))


def _number_or_einval(high: int) -> Parse:
    """A number that is not negative; whatever is wrong with it is EINVAL."""

    def parse(text: str) -> str:
        try:
            return str(_number(text, 0, high))
        except OSError as e:
            raise OSError(errno.EINVAL, e.strerror) from e

    return parse


def _low_half(text: str) -> str:
    """What becomes of a number that the kernel reads as a long and keeps in an int."""
    return str(int(_number_or_einval(_U64)(text)) & _U32)


def _switch(text: str) -> str:
    """kstrtobool(): looks at the first letter, of "on" and "off" at the second."""
    first = text[:1].lower()
    if first in ("y", "t", "e", "1") or text[:2].lower() == "on":
        return "1"
    if first in ("n", "f", "d", "0") or text[:2].lower() == "of":
        return "0"
    raise OSError(errno.EINVAL, f"neither yes nor no: {text[:40]!r}")


def _word(text: str) -> str:
    """sysfs_streq(): with a newline after it or without."""
    return text.removesuffix("\n")


def _plain(value: Any) -> str:
    return f"{value}\n"


def _advisor_mode(value: str) -> str:
    """All modes, with the current one in brackets. samepage's own mode is listed only while it is in force. Then it has
    to be, since writing back what was read would otherwise set another mode. At other times this is what the kernel
    shows."""
    modes = ["none", "scan-time"]
    if value not in modes:
        modes.append(value)
    return " ".join(f"[{mode}]" if mode == value else mode for mode in modes) + "\n"


class File(NamedTuple):
    """A file: `parse` is None for one that can only be read."""

    parse: Parse | None = None
    show: Callable[[Any], str] = _plain

    @property
    def mode(self) -> int:
        """Its permissions."""
        return 0o444 if self.parse is None else 0o644


_PARSE = {
    Format.UINT: _number_or_einval(_U32),
    Format.ULONG: _number_or_einval(_U64),
    Format.INT: _strictly(-(1 << 31), (1 << 31) - 1),
    Format.ULONG_RANGE: _strictly(0, _U64),
    Format.LOW_HALF: _low_half,
    Format.SWITCH: _switch,
    Format.WORD: _word,
}

_COUNTERS = (
    "full_scans",
    "general_profit",
    "ksm_zero_pages",
    "pages_scanned",
    "pages_shared",
    "pages_sharing",
    "pages_skipped",
    "pages_unshared",
    "pages_volatile",
    "stable_node_chains",
    "stable_node_dups",
)

FILES = {name: File() for name in _COUNTERS} | {
    name: File(_PARSE[knob.format], _advisor_mode if name == "advisor_mode" else _plain)
    for name, knob in KNOBS.items()
    if knob.format
}
"""Each file shows the counter or the knob of its name; writing it sets that knob."""


def texts(counters: object, knob: Callable[[str], str]) -> dict[str, str]:
    """The content of each of `FILES`, from the attributes of `counters`, and from what `knob` returns for a name."""
    return {
        name: file.show(getattr(counters, name) if file.parse is None else knob(name)) for name, file in FILES.items()
    }


def value(name: str, written: str) -> str:
    """The value that a write to the file `name` sets the knob to. Raises OSError: ENOENT, EIO (the file can only be
    read), EINVAL, ERANGE."""
    file = FILES.get(name)
    if file is None or file.parse is None:
        code = errno.ENOENT if file is None else errno.EIO
        raise OSError(code, f"{os.strerror(code)}: {name} is no file that can be written")
    return file.parse(written.partition("\0")[0])  # C ends there


def process_texts(row: Mapping[str, Any] | None) -> dict[str, str]:
    """The contents of /proc/PID/ksm_stat and ksm_merging_pages; `row` is None for a process that has not joined."""
    row = row or {}
    numbers = ("ksm_rmap_items", "ksm_zero_pages", "ksm_merging_pages", "ksm_process_profit")
    flags = ("ksm_merge_any", "ksm_mergeable")
    lines = [f"{name} {row.get(name, 0)}" for name in numbers]
    lines += [f"{name}: {'yes' if row.get(name) else 'no'}" for name in flags]
    return {"ksm_stat": "\n".join(lines) + "\n", "ksm_merging_pages": f"{row.get('ksm_merging_pages', 0)}\n"}
