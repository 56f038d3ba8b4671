"""What the kernel does when a full memory cgroup is asked for more: the facts that break.c rests on."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys

import pytest

from benchmarks.memory_cgroup import MemoryCgroup

MIB = 1 << 20

# Fills its cgroup but for a MiB, then asks for two in one of two ways.
PROGRAM = """
import mmap, sys
limit, how = int(sys.argv[1]), sys.argv[2]
memory = mmap.mmap(-1, limit + (8 << 20), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
usage = open(sys.argv[3])
filled = 0
while limit - int(usage.read()) > 1 << 20:
    memory.madvise(23, filled, 64 << 10)  # MADV_POPULATE_WRITE
    filled += 64 << 10
    usage.seek(0)
import ctypes
address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + filled
start = filled + -address % (2 << 20)  # a page that is mapped lies before it
memory[start] = 1
try:
    memory.madvise(25 if how == "collapse" else 23, start, 2 << 20)
    print("done")
except OSError as e:
    print(e.errno)
"""


def ask(group: MemoryCgroup, how: str) -> tuple[int, str]:
    limit = 64 * MIB
    group.set_limit(limit)
    usage = group.path / ("memory.usage_in_bytes" if group.v1 else "memory.current")
    command = [*group.enter(), sys.executable, "-c", PROGRAM, str(limit), how, str(usage)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout.strip() or done.stderr


def test_a_fault_in_a_full_cgroup_wakes_the_oom_killer(group: MemoryCgroup) -> None:
    assert ask(group, "fault") == (-signal.SIGKILL, "")
    assert group.killed() == 1


def test_a_charge_of_a_whole_huge_page_fails_and_nobody_is_killed(group: MemoryCgroup) -> None:
    status, said = ask(group, "collapse")
    if said == str(errno.EINVAL):
        pytest.skip("needs MADV_COLLAPSE (Linux 6.1 with huge pages)")
    assert (status, said) == (0, str(errno.EBUSY))
    assert group.killed() == 0
