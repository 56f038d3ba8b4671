"""What a scraper costs that reads every file ten times a second, and what it sees, while there is much to do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from samepage import agent
from tests.sysfs.conftest import Tree, environment, needs_fuse, until

pytestmark = needs_fuse

SECONDS = 60.0
PERIOD = 0.1
NEVER_DECREASING = ("full_scans", "pages_scanned", "pages_skipped")

# Two of these have equal pages: some for good, some anew every second, and some that are always written.
BUSY = """
import sys, time
import numpy as np
original = np.random.default_rng(1).integers(0, 256, 64 << 20, np.uint8)
written, fresh, at = original.copy(), None, 0
print("ready", flush=True)
while True:
    at += 1
    if at % 100 == 0:
        fresh = original[: 16 << 20].copy()
    written[at % 1000 * 4096 :: 4096 * 1000] = int(sys.argv[1])
    time.sleep(0.01)
"""


def cpu_seconds(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def scrape(directory: Path, names: list[str]) -> dict[str, str]:
    """As node_exporter does it: open, look at its size, read to the end, close."""
    texts = {}
    for name in names:
        fd = os.open(directory / name, os.O_RDONLY)
        os.fstat(fd)
        text = b""
        while part := os.read(fd, 512):
            text += part
        os.close(fd)
        texts[name] = text.decode()
    return texts


@pytest.fixture
def busy(tree: Tree) -> Iterator[None]:
    """Processes that merge and write, and two that take all the CPU time they can get."""
    env = environment(LD_PRELOAD=str(agent.library_path()), SAMEPAGE_SOCKET=tree.socket)
    processes = [
        subprocess.Popen([sys.executable, "-c", BUSY, str(value)], env=env, stdout=subprocess.PIPE) for value in (1, 2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
    processes += [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    yield
    for process in processes:
        process.kill()
        process.communicate()


class Watched(NamedTuple):
    """Shares of a core that the server of the files and the service took, and what was scraped meanwhile."""

    server: float
    service: float
    scrapes: list[dict[str, str]]


def watch(tree: Tree, seconds: float, scraping: bool = True) -> Watched:
    """Scrape ten times a second, or leave it alone."""
    names, scrapes = sorted(os.listdir(tree.path)), []
    pids = (tree.server(), tree.process.pid)
    before, started = [cpu_seconds(pid) for pid in pids], time.monotonic()
    due = started
    while due < started + seconds:
        if scraping:
            scrapes.append(scrape(tree.path, names))
        due += PERIOD
        time.sleep(max(0.0, due - time.monotonic()))
    took = time.monotonic() - started
    server, service = ((cpu_seconds(pid) - was) / took for pid, was in zip(pids, before, strict=True))
    return Watched(server, service, scrapes)


needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="needs root, for pages to be merged however the machine is set"
)


@pytest.mark.long
@pytest.mark.timeout(300)
@needs_root
def test_a_minute_of_scraping_sees_numbers_that_fit_together(tree: Tree, busy: None) -> None:
    until(lambda: int(tree.read("pages_sharing")) > 10_000, "not merged")
    time.sleep(1)  # what was read a moment ago is no part of a scrape
    server, _, scrapes = watch(tree, SECONDS)
    print(f"server {server:.2%} of a core, while ksmd merges")
    assert len(scrapes) > 0.9 * SECONDS / PERIOD
    assert len({texts["pages_scanned"] for texts in scrapes}) > 10, "nothing happened meanwhile"
    for texts in scrapes:
        numbers = {name: int(text) for name, text in texts.items() if name != "advisor_mode"}
        assert all(text == f"{numbers[name]}\n" for name, text in texts.items() if name in numbers)
        # Of one moment: what is saved is told in two ways, and nobody forked here.
        assert numbers["general_profit"] <= 4096 * (numbers["pages_sharing"] + numbers["ksm_zero_pages"])
    for name in NEVER_DECREASING:
        shown = [int(texts[name]) for texts in scrapes]
        assert shown == sorted(shown)


@pytest.mark.long
@pytest.mark.timeout(300)
@needs_root
def test_a_minute_of_scraping_costs_less_than_2_percent_of_a_core(tree: Tree, busy: None) -> None:
    """While others have much to do, and ksmd has not: what it does for itself changes from minute to minute by more."""
    tree.write("run", "0")
    idle = watch(tree, SECONDS / 4, scraping=False)
    server, service, scrapes = watch(tree, SECONDS)
    print(f"server {server:.2%}, service {service:.2%} of a core; without a scraper {idle.service:.2%}")
    assert len(scrapes) > 0.9 * SECONDS / PERIOD
    assert server + service - idle.service < 0.02
