"""Which mappings of a process the kernel's KSM looks at (vma_ksm_compatible in mm/ksm.c)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

NOT_COMPATIBLE = frozenset({"sh", "ms", "io", "pf", "de", "mm", "ht", "dp"})
"""VmFlags of mappings that KSM leaves alone: VM_SHARED, VM_MAYSHARE, VM_SPECIAL, VM_HUGETLB, VM_DROPPABLE."""


@dataclass(frozen=True, slots=True)
class Mapping:
    """A private mapping: its addresses, and whether it is mergeable."""

    start: int
    end: int
    mergeable: bool


def mappings(pid: int) -> list[Mapping]:
    """The mappings that KSM would look at. Empty if the process has ended."""
    found: list[Mapping] = []
    try:
        smaps = Path(f"/proc/{pid}/smaps").read_bytes()
    except OSError:
        return found
    start = end = 0
    for line in smaps.split(b"\n"):  # names of files may have anything else
        if line.startswith(b"VmFlags:"):
            flags = line.decode().split()[1:]
            if NOT_COMPATIBLE.isdisjoint(flags):
                found.append(Mapping(start, end, "mg" in flags))
        elif line[:1] in b"0123456789abcdef" and line:  # the others start with a capital
            start, end = (int(address, 16) for address in line.partition(b" ")[0].split(b"-"))
    return found
