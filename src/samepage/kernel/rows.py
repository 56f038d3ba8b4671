"""What the kernel says of the processes that it merges.

`/proc/PID/ksm_merging_pages` is a plain counter. To answer `ksm_stat`, the kernel waits until nobody changes the
mappings of the process; a process can make that take as long as it likes (with a mapping of a file that a process
serves, say). So samepage reads that only of its user's own processes.
"""

from __future__ import annotations

import contextlib
import os
import re
from mmap import PAGESIZE as PAGE_SIZE
from pathlib import Path
from typing import Any

from samepage.kernel.target import name
from samepage.process.halt import halt_of
from samepage.process.identity import identify

FIELDS = ("ksm_rmap_items", "ksm_zero_pages", "ksm_merging_pages", "ksm_process_profit")


def merging_pages(pid: int) -> int:
    """How many pages the kernel merged, not counting those merged with its page of zeros. 0: none, or unknown."""
    with contextlib.suppress(OSError, ValueError):
        return int(Path(f"/proc/{pid}/ksm_merging_pages").read_text())
    return 0


def processes() -> list[int]:
    """The processes of which the kernel has merged something, as far as this user may know."""
    return sorted(pid for entry in os.listdir("/proc") if entry.isdecimal() and merging_pages(pid := int(entry)))


def is_mergeable(pid: int) -> bool:
    """Whether all memory of a process is mergeable (PR_SET_MEMORY_MERGE). Only for one's own processes."""
    with contextlib.suppress(OSError):
        return "ksm_merge_any: yes" in Path(f"/proc/{pid}/ksm_stat").read_text()
    return False


def row_of(pid: int, near: bool = False) -> dict[str, Any] | None:
    """The row of a process; None if it has ended. `near`: it is one's own, whichever user it became."""
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
    """How many pages of anonymous memory it has, merged or not."""
    with contextlib.suppress(OSError):
        resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[1:3]
        return int(resident) - int(shared)
    return 0
