"""What the kernel says of the processes that it merges.

`/proc/PID/ksm_merging_pages` it tells of its own counter. For `ksm_stat` it waits until nobody changes the mappings of
the process, and who changes them may take for as long as they like (a mapping of a file that a process serves, say); so
that is asked only of one's own processes.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any

from samepage.kernel.target import name
from samepage.memory import PAGE_SIZE
from samepage.memory.halt import halt_of
from samepage.memory.identity import identify

FIELDS = ("ksm_rmap_items", "ksm_zero_pages", "ksm_merging_pages", "ksm_process_profit")


def merging_pages(pid: int) -> int:
    """Pages that the kernel merged, those with its page of zeros left out. 0: none, or that is not told."""
    with contextlib.suppress(OSError, ValueError):
        return int(Path(f"/proc/{pid}/ksm_merging_pages").read_text())
    return 0


def processes() -> list[int]:
    """Those of which the kernel has merged something, and that may be told."""
    return sorted(pid for entry in os.listdir("/proc") if entry.isdecimal() and merging_pages(pid := int(entry)))


def is_mergeable(pid: int) -> bool:
    """Whether all memory of a process is (PR_SET_MEMORY_MERGE). Only of one's own processes."""
    with contextlib.suppress(OSError):
        return "ksm_merge_any: yes" in Path(f"/proc/{pid}/ksm_stat").read_text()
    return False


def row_of(pid: int, near: bool = False) -> dict[str, Any] | None:
    """None: it has ended. `near`: it is one's own, whoever it became."""
    try:
        who = identify(pid)
        near = near or set(who.uids) == {os.geteuid()}
        stat = Path(f"/proc/{pid}/ksm_stat").read_text() if near else ""
    except OSError:
        return None
    found = {key: int(value) for key, value in re.findall(r"^(\w+):? (-?\d+)$", stat, re.MULTILINE)}
    counts = {field: found.get(field, 0) for field in FIELDS}
    counts["ksm_merging_pages"] = counts["ksm_merging_pages"] or merging_pages(pid)
    merged = counts["ksm_merging_pages"] + counts["ksm_zero_pages"]
    return {
        "pid": pid,
        "comm": name(pid),
        "state": halt.why if (halt := halt_of(pid, pid)) else "running",
        "domain": str(who.domain),
        "owner": str(who.domain),
        "merged": merged,
        "bytes_needed": merged * PAGE_SIZE,
        **counts,
        "ksm_merge_any": "ksm_merge_any: yes" in stat,
        "ksm_mergeable": "ksm_mergeable: yes" in stat or merged > 0,
    }


def anonymous_pages(pid: int) -> int:
    """Its pages of anonymous memory, merged or not."""
    with contextlib.suppress(OSError):
        resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[1:3]
        return int(resident) - int(shared)
    return 0
