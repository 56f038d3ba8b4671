"""What debuggers and core dumps find of a process that is being merged is what the process has."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from samepage.memory import AREA, EXTENT, AddressSpaceGone, PageStatus
from tests.agent.asked import HUGE, PROGRAM, Process
from tests.agent.preload import ROOT, Preload, compile_c

PAGES = 4 * HUGE
ROUNDS = int(os.environ.get("SAMEPAGE_TEST_STOPS", "5"))

WRITING = PROGRAM.replace(
    "for line in sys.stdin:",
    """import os, select
null = os.open("/dev/null", os.O_WRONLY)
def lines():
    while True:
        for p in range(0, n, 64 << 10):
            os.write(null, memoryview(area)[start + p : start + p + 4096])
        if select.select([sys.stdin], [], [], 0)[0]:
            line = sys.stdin.readline()
            if not line:
                return
            yield line
for line in lines():""",
)
"""The same, and hands pages to the kernel all the time, which a tracer then reads."""


@contextmanager
def merging(process: Process) -> Iterator[None]:
    """Merge and unmerge all pages without end, as long as the process answers."""
    process.insist()
    first = process.address // 4096
    stop = threading.Event()

    def merge() -> None:
        with suppress(AddressSpaceGone, OSError):
            while not stop.is_set():
                donation = process.space.donate(np.array([(first, PAGES)], AREA))
                if (donation.status == PageStatus.DONE).all():
                    process.space.merge(donation.segment, np.array([(first, PAGES, 0)], EXTENT))
                process.space.break_ksm(first, PAGES)
                if donation.segment is not None:
                    donation.segment.close()

    thread = threading.Thread(target=merge)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def wrong_pages(core: Path, address: int) -> list[int]:
    """Pages of the area that a core file has not, or not as the program wrote them."""
    with core.open("rb") as file:
        header = file.read(64)
        offset, count = struct.unpack_from("<Q", header, 32)[0], struct.unpack_from("<H", header, 56)[0]
        file.seek(offset)
        loads = [struct.unpack("<IIQQQQQQ", file.read(56)) for _ in range(count)]
        wrong = set(range(PAGES))
        for kind, _, at, start, _, size, _, _ in loads:
            if kind != 1:
                continue
            for page in range(max(start, address), min(start + size, address + PAGES * 4096), 4096):
                file.seek(at + page - start)
                mine = page - address
                if file.read(4096) == mine.to_bytes(8, "little") + bytes(4088):
                    wrong.discard(mine // 4096)
    return sorted(wrong)


def needs(tool: str) -> str:
    found = shutil.which(tool)
    if found is None:
        pytest.skip(f"needs {tool}")
    return found


@pytest.mark.parametrize("advice", ["MADV_NOHUGEPAGE", "MADV_HUGEPAGE"])
def test_reading_the_agents_windows_costs_no_page(preload: Preload, tmp_path: Path, advice: str) -> None:
    reader = compile_c(ROOT / "tests" / "agent" / "reader.c", tmp_path / "reader")
    process = Process(preload, tmp_path, advice=advice)
    with merging(process):
        command = [str(reader), str(process.process.pid), str(40 * ROUNDS)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert int(done.stdout) > PAGES * ROUNDS
    assert process.tell("check") == "0\n"
    process.end()


def test_the_agents_windows_are_in_no_dump(preload: Preload, tmp_path: Path) -> None:
    process = Process(preload, tmp_path, advice="MADV_NOHUGEPAGE")
    process.space.scan(process.address // 4096, PAGES)  # the windows are there by then
    mappings = re.findall(r"^VmFlags: (.*)", Path(f"/proc/{process.process.pid}/smaps").read_text(), re.MULTILINE)
    assert sum({"dd", "uw"} <= set(flags.split()) for flags in mappings) >= 1
    process.end()


def test_a_program_under_strace_goes_on(preload: Preload, tmp_path: Path) -> None:
    strace = needs("strace")
    command = [strace, "-f", "-o", "/dev/null", sys.executable, "-c", WRITING, "MADV_NOHUGEPAGE"]
    process = Process(preload, tmp_path, command=command)
    with merging(process):
        time.sleep(1)
    assert process.tell("check") == "0\n"
    process.end()


def test_strace_comes_and_goes(preload: Preload, tmp_path: Path) -> None:
    strace = needs("strace")
    process = Process(preload, tmp_path, program=WRITING, advice="MADV_NOHUGEPAGE")
    pid = process.process.pid
    with merging(process):
        for _ in range(ROUNDS):
            with subprocess.Popen(
                [strace, "-f", "-o", "/dev/null", "-p", str(pid)], stderr=subprocess.PIPE, text=True
            ) as attached:
                assert attached.stderr is not None
                attached.stderr.readline()  # "attached"
                time.sleep(0.05)
                attached.send_signal(signal.SIGINT)
                attached.communicate(timeout=10)
            time.sleep(0.02)
    assert process.tell("check") == "0\n"
    process.end()


@pytest.mark.timeout(120 + ROUNDS * 5)
def test_gcore_finds_every_page(preload: Preload, tmp_path: Path) -> None:
    gcore = needs("gcore")
    process = Process(preload, tmp_path, advice="MADV_NOHUGEPAGE")
    pid = process.process.pid
    with merging(process):
        for _ in range(ROUNDS):
            done = subprocess.run(
                [gcore, "-o", tmp_path / "core", str(pid)], capture_output=True, text=True, timeout=60
            )
            assert done.returncode == 0, done.stdout + done.stderr
            core = tmp_path / f"core.{pid}"
            assert wrong_pages(core, process.address) == []
            core.unlink()
    assert process.tell("check") == "0\n"
    process.end()


@pytest.mark.timeout(120 + ROUNDS * 5)
def test_the_kernels_core_has_every_page(preload: Preload, tmp_path: Path) -> None:
    if Path("/proc/sys/kernel/core_pattern").read_text() != "core\n":
        pytest.skip("core files go elsewhere")
    program = f"import os\nos.chdir({str(tmp_path)!r})\n" + PROGRAM
    program += "\n"
    for turn in range(ROUNDS):
        folder = tmp_path / str(turn)
        folder.mkdir()
        process = Process(preload, folder, program=program, advice="MADV_NOHUGEPAGE")
        pid = process.process.pid
        resource.prlimit(pid, resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        with merging(process):
            time.sleep(0.02 + turn % 100 / 5000)
            process.process.send_signal(signal.SIGABRT)  # what runs in the background may ignore SIGQUIT
            process.process.wait()
        core = tmp_path / (f"core.{pid}" if (tmp_path / f"core.{pid}").exists() else "core")
        assert wrong_pages(core, process.address) == []
        core.unlink()
        process.end()
