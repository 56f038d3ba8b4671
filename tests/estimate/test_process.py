"""Real processes, looked at from outside."""

from __future__ import annotations

import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks import kernel_ksm
from samepage import agent
from samepage.estimate import process
from samepage.estimate.look import look
from samepage.estimate.process import PageFlags, Process
from samepage.estimate.report import Pages, Report
from samepage.estimate.source import Kind, Left, PageFlag, ScanError
from samepage.memory import PAGE_SIZE, pagemap
from tests.estimate.conftest import report_of
from tests.estimate.subject import Subject, mapping_at

Scan = Callable[..., Report]
PATIENCE = 60.0
REACH = Path(__file__).with_name("reach.c")


def entries(pid: int, address: int, npages: int) -> list[int]:
    """What /proc/PID/pagemap has for these pages."""
    with open(f"/proc/{pid}/pagemap", "rb") as pagemap:
        pagemap.seek(address // PAGE_SIZE * 8)
        return list(struct.unpack(f"{npages}Q", pagemap.read(npages * 8)))


def frames(pid: int, address: int, npages: int) -> list[int]:
    """Page frame numbers and whether each is mapped once."""
    return [entry & ((1 << 55) - 1 | 1 << 56) for entry in entries(pid, address, npages)]


def wait_for(what: Callable[[], bool], why: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline, f"after {PATIENCE} s: {why}"
        time.sleep(0.05)


def test_pages_are_told_apart_by_content(scan: Scan) -> None:
    with Subject() as one, Subject() as two:
        here, there = one.region(100), two.region(100)
        one.fill(0, [0] * 10 + list(range(1000, 1020)) + [7, 8, 9] * 10 + list(range(2000, 2025)))
        two.fill(0, [*range(2000, 2025), 5])
        report = scan(one.pid, two.pid)
        mine, theirs = (mapping_at(report, *at).pages for at in ((one.pid, here), (two.pid, there)))
    assert mine == Pages(85, 20, 10, 30, 25, 0, 0, 0, 0)
    assert (theirs.total, theirs.unique, theirs.duplicate_between) == (26, 1, 25)
    assert report.page_flags == "kpageflags"


def test_pages_that_were_never_touched_stay_so(scan: Scan) -> None:
    with Subject() as one:
        here = one.region(1000)
        one.fill(500, [1, 2, 3])
        before = Path(f"/proc/{one.pid}/smaps_rollup").read_text()
        assert mapping_at(scan(one.pid), one.pid, here).pages.total == 3
        assert np.count_nonzero(entries(one.pid, here, 1000)) == 3
        assert Path(f"/proc/{one.pid}/smaps_rollup").read_text().splitlines()[1] == before.splitlines()[1]


def test_pages_shared_by_fork_are_no_new_savings_and_stay_shared(scan: Scan) -> None:
    with Subject() as parent:
        here = parent.region(200)
        parent.fill(0, list(range(1, 201)))
        child = int(parent.do("out = os.fork() or (signal.pause() and 0)"))
        try:
            before = frames(parent.pid, here, 200), frames(child, here, 200)
            report = scan(parent.pid, child)
            after = frames(parent.pid, here, 200), frames(child, here, 200)
        finally:
            os.kill(child, signal.SIGKILL)
        mine, childs = (mapping_at(report, pid, here).pages for pid in (parent.pid, child))
    assert before == after  # looking has not made copies, as process_vm_readv(2) would
    assert before[0] == before[1]
    assert (mine.total, mine.unique, mine.already_shared) == (200, 200, 0)
    assert (childs.total, childs.unique, childs.already_shared) == (200, 0, 200)
    assert report.already_shared.fork >= 200


def test_pages_shared_with_somebody_who_is_not_looked_at_cannot_be_freed(scan: Scan) -> None:
    with Subject() as parent:
        here = parent.region(100)
        parent.fill(0, [1, 2] * 50)
        child = int(parent.do("out = os.fork() or (signal.pause() and 0)"))
        try:
            alone, both = mapping_at(scan(child), child, here), scan(child, parent.pid)
        finally:
            os.kill(child, signal.SIGKILL)
    assert (alone.pages.already_shared, alone.pages.duplicate_inside) == (100, 0)
    assert both.by_page.saved_bytes >= 98 * PAGE_SIZE


@pytest.mark.timeout(600)  # somebody else may have KSM borrowed
def test_pages_that_the_kernel_merged_are_told_apart_and_never_counted_again(scan: Scan) -> None:
    if not kernel_ksm.available():
        pytest.skip("needs root and a kernel with KSM")
    with kernel_ksm.borrowed(**kernel_ksm.FASTEST, run=2):
        kernel_ksm.write("run", 1)
        with Subject() as one, Subject() as two:
            here = [subject.region(300) for subject in (one, two)]
            for subject in (one, two):
                subject.fill(0, list(range(1, 301)))
                subject.do("m.madvise(mmap.MADV_MERGEABLE)")
            wait_for(lambda: all(kernel_ksm.merging_pages(s.pid) == 300 for s in (one, two)), "not merged")
            before = [frames(s.pid, at, 300) for s, at in zip((one, two), here, strict=True)]
            report = scan(one.pid, two.pid)
            assert before == [frames(s.pid, at, 300) for s, at in zip((one, two), here, strict=True)]
            merged = [mapping_at(report, s.pid, at).pages for s, at in zip((one, two), here, strict=True)]
            # One more that is equal: it would be merged with the page there is, and frees all it has.
            with Subject() as three:
                third = three.region(300)
                three.fill(0, list(range(1, 301)))
                more = scan(one.pid, two.pid, three.pid)
                new = mapping_at(more, three.pid, third).pages
    assert [pages.already_shared for pages in merged] == [300, 300]
    assert report.already_shared.ksm == 600
    assert report.by_page.pages_shared >= 300
    assert report.by_page.pages_sharing >= 300
    assert new.duplicate_between == 300
    assert more.by_page.saved_bytes - report.by_page.saved_bytes >= 300 * PAGE_SIZE


def agents_windows(pid: int) -> set[int]:
    """Where those of an agent start that it moves pages to."""
    found, start = set(), 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-", line):
            start = int(line.partition("-")[0], 16)
        elif line.startswith("VmFlags:") and {"uw", "dc", "dd"}.issubset(line.split()):
            found.add(start)
    return found


def test_pages_that_samepage_merged_are_told_apart(scan: Scan) -> None:
    if not agent.library_path().exists():
        pytest.skip(f"needs the agent, and there is no {agent.library_path()}")
    program = (
        "import hashlib, os, time; a = hashlib.shake_128(b'').digest(8 << 20); os.write(1, b'%d\\n' % os.getpid())"
    )
    shell = 'for i in 1 2; do "$0" -c "$1; time.sleep(600)" & done; wait'
    command = [sys.executable, "-m", "samepage", "run", "--", "sh", "-c", shell, sys.executable, program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True) as run:
        try:
            assert run.stdout is not None
            pids = [int(run.stdout.readline()) for _ in range(2)]
            wait_for(lambda: scan(*pids).already_shared.samepage >= 2 * 2000, "not merged")
            report = scan(*pids)
            windows = agents_windows(pids[0])
            opened = Process(pids[0]).open()
            for fd in (opened.fd, *opened.more):
                os.close(fd)
        finally:
            os.killpg(run.pid, signal.SIGKILL)
    assert windows
    assert not windows & {mapping.start for mapping in opened.mappings}
    assert any(mapping.kind == Kind.SEGMENT for source in report.sources for mapping in source.mappings)
    assert report.samepage_run.saved_bytes < 1 << 20


def test_the_kernels_page_of_zeros_is_shared_already(scan: Scan) -> None:
    with Subject() as one:
        here = one.region(50)
        one.do("out = sum(m[i * PAGE] for i in range(50))")  # read, never written
        one.fill(0, [0])
        pages = mapping_at(scan(one.pid), one.pid, here).pages
    assert (pages.total, pages.zero, pages.already_shared) == (50, 1, 49)


def test_huge_pages_are_counted(scan: Scan) -> None:
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("needs transparent huge pages, and they are switched off")
    with Subject() as one:
        here = one.region(2048, more=", huge=True")
        one.fill(0, list(range(1, 2049)))
        one.fill(600, [7] * 100)
        if "AnonHugePages:         0 kB" in Path(f"/proc/{one.pid}/smaps_rollup").read_text():
            pytest.skip("the kernel had no huge page to give")
        pages = mapping_at(scan(one.pid), one.pid, here).pages
    assert pages.huge >= 512
    assert pages.duplicate_inside >= 100


def test_shared_memory_is_not_looked_at(scan: Scan) -> None:
    with Subject() as one:
        here = one.region(50, more=", flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS")
        one.fill(0, [1] * 50)
        (source,) = scan(one.pid).sources
    assert not any(mapping.start <= here < mapping.end for mapping in source.mappings)


def test_a_large_block_of_mallocs_is_an_allocation_that_samepage_run_would_take(scan: Scan) -> None:
    with Subject() as one:
        before = scan(one.pid)
        one.do("large = [bytes([65 + i]) * (3 << 20) for i in range(2)]")
        report = scan(one.pid)
    allocations = [m for m in report.sources[0].mappings if m.kind == Kind.ALLOCATION]
    sizes = [mapping.end - mapping.start for mapping in allocations]
    assert [size for size in sizes if 3 << 20 < size <= (3 << 20) + 2 * PAGE_SIZE] == 2 * [(3 << 20) + PAGE_SIZE]
    assert report.samepage_run.pages - before.samepage_run.pages >= 2 * 768
    # One page with the header, one at the end, and all between is one content.
    assert report.samepage_run.saved_bytes - before.samepage_run.saved_bytes >= 2 * 740 * PAGE_SIZE


def reach(folder: Path, *flags: str) -> Path:
    """tests/estimate/reach.c, compiled."""
    program = folder / f"reach{''.join(flags)}"
    subprocess.run(["gcc", "-O1", "-pthread", *flags, REACH, "-o", program], check=True)
    return program


def left_alone(scan: Scan, program: Path) -> tuple[dict[str, float], float, float]:
    """What `samepage run` would leave alone of reach.c, what it would take, and with --memory large, in MiB."""
    with subprocess.Popen([program], stdout=subprocess.PIPE, text=True) as run:
        try:
            assert run.stdout is not None
            assert run.stdout.readline() == "ready\n"
            report = scan(run.pid)
        finally:
            run.kill()
    pages = {row.reason: row.pages * PAGE_SIZE / 2**20 for row in report.left_alone}
    taken, large = (run.pages * PAGE_SIZE / 2**20 for run in (report.samepage_run, report.samepage_run_large))
    return pages, taken, large


def test_what_samepage_run_would_leave_alone_is_told_by_reason(scan: Scan, tmp_path: Path) -> None:
    left, taken, large = left_alone(scan, reach(tmp_path))
    assert left.pop(Left.BLOCKS) == pytest.approx(4, abs=0.3)  # in a thread's arena
    assert left.pop(Left.STACK) == pytest.approx(4, abs=0.3)
    assert left.pop(Left.FILE) == pytest.approx(4, abs=0.3)
    assert left == {}
    # The brk heap, and blocks that malloc maps though they are smaller than 1 MiB, besides what `mapped` would take.
    assert taken == pytest.approx(16, abs=0.7)
    assert large == pytest.approx(4, abs=0.3)


def test_samepage_run_would_take_nothing_of_a_statically_linked_program(scan: Scan, tmp_path: Path) -> None:
    left, taken, large = left_alone(scan, reach(tmp_path, "-static"))
    assert left == {Left.STATIC: pytest.approx(28, abs=0.7)}
    assert taken == large == 0


def test_what_a_mapping_is_is_told(scan: Scan) -> None:
    with Subject() as one:
        (source,) = scan(one.pid).sources
    kinds = {mapping.kind for mapping in source.mappings}
    assert {Kind.HEAP, Kind.STACK, Kind.FILE, Kind.ANONYMOUS} <= kinds
    names = [mapping.name for mapping in source.mappings if mapping.kind == Kind.FILE]
    assert any("libc" in name for name in names)
    assert all(mapping.pages.total for mapping in source.mappings)


def test_without_page_flags_what_is_mapped_twice_is_shared_with_nobody_knows_whom() -> None:
    with Subject() as parent:
        here = parent.region(60)
        parent.fill(0, [3] * 20 + list(range(100, 140)))
        child = int(parent.do("out = os.fork() or (signal.pause() and 0)"))
        try:
            parent.fill(0, [3] * 20)  # these are its own again
            report = report_of(Process(parent.pid), Process(child))
        finally:
            os.kill(child, signal.SIGKILL)
        pages = mapping_at(report, parent.pid, here).pages
    assert report.page_flags == "unavailable"
    assert (pages.total, pages.already_shared, pages.unique) == (60, 40, 0)
    assert pages.duplicate_inside + pages.duplicate_between == 20


def test_a_kernel_without_pagemap_scan_tells_the_same(monkeypatch: pytest.MonkeyPatch, page_flags: PageFlags) -> None:
    """Before Linux 6.7."""
    with Subject() as one:
        here = one.region(100)
        one.fill(0, [0, 1, 2, 3, 3])
        one.fill(60, [4, 3])
        with_it = mapping_at(report_of(Process(one.pid, page_flags)), one.pid, here).pages
        monkeypatch.setattr(pagemap, "PAGEMAP_SCAN", 0xC0606699)
        without = report_of(Process(one.pid, page_flags))
    assert mapping_at(without, one.pid, here).pages == with_it
    assert with_it == Pages(7, 3, 1, 3, 0, 0, 0, 0, 0)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "BATCH_PAGES", 64)


@pytest.mark.usefixtures("small_batches")
def test_a_process_that_ends_half_way_is_told_of_and_what_was_read_is_kept() -> None:
    with Subject() as one:
        one.region(20_000)
        one.do("fill(m, 0, range(1, 20_001))")
        seen = look([Process(one.pid)], progress=lambda *_: one.kill())
    (problem,) = seen.problems
    assert f"process {one.pid} (python" in problem
    assert "ended while it was looked at" in problem
    (rows,) = seen.sources
    read = rows.npages - rows.unreadable
    assert 64 <= read < 20_000
    assert f"the {read} pages read before are kept" in problem


@pytest.mark.usefixtures("small_batches")
def test_a_process_that_becomes_another_program_half_way_is_told_of() -> None:
    with Subject() as one:
        one.region(20_000)
        one.do("fill(m, 0, range(1, 20_001))")
        before = os.readlink(f"/proc/{one.pid}/exe")

        def execute(*_: object) -> None:
            if os.readlink(f"/proc/{one.pid}/exe") == before:
                one.send("os.execv('/bin/sleep', ['sleep', '600'])")
                wait_for(lambda: os.readlink(f"/proc/{one.pid}/exe") != before, "no exec")

        seen = look([Process(one.pid)], progress=execute)
    (problem,) = seen.problems
    assert "became another program while it was looked at" in problem
    assert seen.flags[seen.flags & PageFlag.UNREADABLE == 0].size >= 64


def test_a_process_that_is_not_there_is_told_of() -> None:
    with Subject() as one:
        pass
    with pytest.raises(ScanError, match=f"process {one.pid}: no such process"):
        Process(one.pid).open()


def test_a_zombie_and_a_kernel_thread_have_no_memory() -> None:
    zombie = os.fork()
    if not zombie:
        os._exit(0)
    wait_for(lambda: ") Z " in Path(f"/proc/{zombie}/stat").read_text(), "no zombie")
    try:
        with pytest.raises(ScanError, match="has no memory: it has ended"):
            Process(zombie).open()
    finally:
        os.waitpid(zombie, 0)
    if not Path("/proc/2/comm").exists() or Path("/proc/2/comm").read_text() != "kthreadd\n":
        return
    with pytest.raises(ScanError, match="has no memory: it is a kernel thread"):
        Process(2).open()


def test_looking_holds_no_descriptors_open(scan: Scan) -> None:
    with Subject() as one:
        scan(one.pid)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            scan(one.pid)
        assert len(os.listdir("/proc/self/fd")) == before
