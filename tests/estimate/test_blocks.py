"""What `samepage run` saves besides, since it has blocks of malloc's begin with a page."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from samepage.estimate.process import PageFlags, Process
from samepage.estimate.report import Report
from tests.estimate.conftest import report_of

Scan = Callable[..., Report]
SOURCE = Path(__file__).with_name("offsets.c")
BLOCKS, BYTES = 256, 100_000  # offsets.c
PAGES_OF_BLOCK = BYTES // 4096


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("offsets") / "offsets"
    subprocess.run(["gcc", "-O1", "-pthread", SOURCE, "-o", built], check=True)
    return built


@contextmanager
def running(program: Path, *arguments: tuple[str, ...]) -> Iterator[list[int]]:
    """A copy of it with each of these arguments."""
    with ExitStack() as stack:
        copies = []
        for argument in arguments:
            copy = stack.enter_context(subprocess.Popen([program, *argument], stdout=subprocess.PIPE, text=True))
            stack.callback(copy.kill)
            copies.append(copy)
        for copy in copies:
            assert copy.stdout is not None
            assert copy.stdout.readline() == "ready\n"
        yield [copy.pid for copy in copies]


@pytest.mark.parametrize("where", [(), ("thread",)], ids=["heap", "arena"])
def test_blocks_at_different_offsets_are_equal_when_they_begin_with_a_page(
    scan: Scan, program: Path, where: tuple[str, ...]
) -> None:
    with running(program, ("1000", *where), ("3000", *where)) as pids:
        report = scan(*pids)
    assert report.by_page.saved_bytes < 1 << 20  # one block lies as its twin does, by accident
    assert report.blocks.count == 2 * BLOCKS
    # Of each pair one is saved, but for the first page and the rest, which are not reckoned with.
    least, most = (BLOCKS - 2) * (PAGES_OF_BLOCK - 1) * 4096, BLOCKS * BYTES
    assert least <= report.blocks.saved_bytes <= most


def test_what_is_equal_as_it_lies_is_not_counted_twice(scan: Scan, program: Path) -> None:
    with running(program, ("1000",), ("1000",)) as pids:
        report = scan(*pids)
    assert report.by_page.saved_bytes > BLOCKS * (PAGES_OF_BLOCK - 1) * 4096
    assert report.blocks.count == 2 * BLOCKS
    assert report.blocks.saved_bytes <= BLOCKS * 4096


def test_a_sample_says_about_the_same(program: Path, page_flags: PageFlags) -> None:
    with running(program, ("1000",), ("3000",)) as pids:
        processes = [Process(pid, page_flags) for pid in pids]
        whole, sample = report_of(*processes), report_of(*processes, sample=0.5)
    assert sample.blocks.saved_bytes == pytest.approx(whole.blocks.saved_bytes, rel=0.25)


def test_samepage_run_saves_as_much(program: Path, tmp_path: Path) -> None:
    """The real thing: two copies with different offsets."""
    both = f"{program} 1000 & {program} 3000 & sleep 8; kill %1 %2"
    report = tmp_path / "report.json"
    command = ["--set", "sleep_millisecs=5", "--json", str(report), "bash", "-mc", both]
    run = [sys.executable, "-m", "samepage", "run", *command]
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120)
    assert json.loads(report.read_text())["bytes_saved_peak"] >= 0.9 * BLOCKS * BYTES
