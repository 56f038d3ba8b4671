"""Who reads and writes the memory of a process from outside finds and leaves what it should, merging or not."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from samepage.memory import AREA, EXTENT, PageStatus
from samepage.memory.wire import Swap
from tests.agent.asked import HUGE, MADV_DONTFORK, PROGRAM, Process, under_filter
from tests.agent.preload import ROOT, Preload, compile_c

PAGES = 4 * HUGE
PTRACE_SEIZE, PTRACE_DETACH = 0x4206, 17


@pytest.fixture
def process(preload: Preload, tmp_path: Path) -> Iterator[Process]:
    made = Process(preload, tmp_path, advice="MADV_NOHUGEPAGE")
    yield made
    made.end()


@pytest.fixture(scope="module")
def outsider(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("outsider") / "outsider"
    return compile_c(ROOT / "tests" / "agent" / "outsider.c", path)


@pytest.mark.parametrize("how", ["mem", "vm"])
def test_no_word_is_wrong_of_those_written_from_outside(process: Process, outsider: Path, how: str) -> None:
    """At full rate, while all is merged and broken without end."""
    first = process.address // 4096
    area = np.array([(first, PAGES)], AREA)
    command = [str(outsider), str(process.process.pid), str(process.address), str(PAGES), "4", how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        merged = 0
        while running.poll() is None:
            donation = process.space.donate(area)
            pages = np.flatnonzero(donation.status == PageStatus.DONE)
            extents = np.array([(first + page, 1, at) for at, page in enumerate(pages)], EXTENT)
            status = process.space.merge(donation.segment, extents).status
            merged += int((status == PageStatus.DONE).sum())
            process.space.break_ksm(first, PAGES)
            assert donation.segment is not None
            donation.segment.close()
        assert running.stdout is not None
        tries, failed, wrong, _ = map(int, running.stdout.read().split())
    assert running.returncode == 0
    assert wrong == 0
    assert merged > PAGES // 8  # on a busy machine it gets no further
    assert failed < tries / 20
    if how == "vm":
        assert failed == 0  # the kernel lets these wait


def test_a_process_that_is_traced_is_left_as_it_is(process: Process) -> None:
    first = process.address // 4096
    donation = process.space.donate(np.array([(first, PAGES)], AREA))
    extents = np.array([(first, PAGES, 0)], EXTENT)
    libc = ctypes.CDLL(None, use_errno=True)
    pid = process.process.pid
    if libc.ptrace(PTRACE_SEIZE, pid, None, None):
        pytest.skip(f"needs to trace a process: {os.strerror(ctypes.get_errno())}")
    time.sleep(0.02)  # it looks now and then
    assert (process.space.merge(donation.segment, extents).status == PageStatus.BUSY).all()
    os.kill(pid, 19)  # SIGSTOP, for who detaches must have it stopped
    os.waitpid(pid, 0)
    assert libc.ptrace(PTRACE_DETACH, pid, None, None) == 0
    os.kill(pid, 18)
    time.sleep(0.02)
    assert (process.space.merge(donation.segment, extents).status == PageStatus.DONE).all()
    assert process.tell("check") == "0\n"


@pytest.mark.parametrize("advice", ["MADV_NOHUGEPAGE", "MADV_HUGEPAGE"])
def test_nothing_is_merged_where_the_agent_may_not_wait_for_who_writes_from_outside(
    preload: Preload, tmp_path: Path, advice: str
) -> None:
    """It waits by a call that takes the mmap_lock; a seccomp filter may forbid it. That waiting keeps bytes is shown
    with a writer that is held up in the kernel: `make test-kernels`, "writers from outside"."""
    command = under_filter(MADV_DONTFORK, errno.EPERM, [sys.executable, "-c", PROGRAM, advice])
    process = Process(preload, tmp_path, command=command, SAMEPAGE_SECCOMP="1")
    if process.space.swap != Swap.MOVE:
        pytest.skip(f"pages are not swapped by move here, but: {process.space.swap.name}")
    first = process.address // 4096
    donation = process.space.donate(np.array([(first, PAGES)], AREA))
    assert donation.segment is not None
    status = process.space.merge(donation.segment, np.array([(first, PAGES, 0)], EXTENT)).status
    donation.segment.close()
    assert (status == PageStatus.BUSY).all()
    assert process.tell("check") == "0\n"
    process.end()
