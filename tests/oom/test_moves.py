"""A move that leaves its memory behind copies merged pages. Without memory for that it fails, and nobody is killed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.memory_cgroup import UNLIMITED, MemoryCgroup
from samepage import agent
from samepage.memory import AREA, EXTENT, PageStatus
from tests.agent.asked import HUGE, Process
from tests.agent.preload import Preload
from tests.oom.conftest import needs_agent

pytestmark = needs_agent

PAGES = 4 * HUGE
PROGRAM = f"""
import ctypes, mmap, sys
n = {PAGES} << 12
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
size = ctypes.c_size_t(n)
address = libc.mmap(None, size, 3, 0x22, -1, ctypes.c_long(0))
libc.madvise(ctypes.c_void_p(address), size, 15)  # MADV_NOHUGEPAGE
for page in range(0, n, 4096):
    ctypes.memset(address + page, page // 4096 % 255 + 1, 4096)
libc.madvise(ctypes.c_void_p(address), size, 12)  # MADV_MERGEABLE
print(address, flush=True)
for line in sys.stdin:
    if line == "move\\n":
        to = libc.mremap(ctypes.c_void_p(address), size, size, 5, None)  # MAYMOVE | DONTUNMAP
        if to == ctypes.c_void_p(-1).value:
            print(ctypes.get_errno(), flush=True)
            continue
        address = to
        print("moved", flush=True)
    else:
        print(sum(ctypes.string_at(address + p, 2)[0] != p // 4096 % 255 + 1 for p in range(0, n, 4096)), flush=True)
"""


def test_it_fails_where_there_is_no_memory_for_the_copies(group: MemoryCgroup, tmp_path: Path) -> None:
    process = Process(Preload(agent.library_path(), ""), tmp_path, PROGRAM)
    try:
        first = process.address // 4096
        donation = process.space.donate(np.array([(first, PAGES)], AREA))
        merged = process.space.merge(donation.segment, np.array([(first, PAGES, 0)], EXTENT))
        assert (merged.status == PageStatus.DONE).all()
        (group.path / "cgroup.procs").write_text(str(process.process.pid))
        group.set_limit(PAGES // 2 * 4096)
        assert process.tell("move") == "12\n"  # ENOMEM
        assert process.tell("check") == "0\n"
        group.set_limit(UNLIMITED)
        assert process.tell("move") == "moved\n"
        assert process.tell("check") == "0\n"
        assert group.killed() == 0
    finally:
        process.end()
