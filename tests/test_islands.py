"""Pages that were merged and then overwritten: they are merged again, and nobody who holds one of them loses a byte."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.test_whole import MIB, PATIENCE, SAMEPAGE, private_service, smaps

MEBIBYTES = 64
PAGES = MEBIBYTES * MIB // 4096

# Fills an array from a seed when told to, and says whether all of it is as it should be.
OVERWRITER = f"""
import sys
import numpy as np
array = np.empty({MEBIBYTES} << 20, np.uint8)
region = None
for line in sys.stdin:
    what, seed = line.split()
    if what == "fill":
        array[:] = np.random.default_rng(int(seed)).integers(0, 256, len(array), np.uint8)
    elif what == "register":
        import samepage
        region = samepage.register(array)
    elif what == "unmerge":
        region.unmerge()
    elif what == "merge":
        print(region.merge(), flush=True)
        continue
    else:
        print((array == np.random.default_rng(int(seed)).integers(0, 256, len(array), np.uint8)).all(), flush=True)
        continue
    print("done", flush=True)
"""


class Overwriters:
    """Processes that are told what to write."""

    def __init__(self, env: dict[str, str], count: int = 2) -> None:
        self.env = env
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", OVERWRITER], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for _ in range(count)
        ]
        self.tell("check")  # reads what is not there yet
        self.empty = self.pss()

    def tell(self, what: str, seed: int = 0) -> list[str]:
        """Have all of them do something, and wait for what they say."""
        for p in self.processes:
            print(what, seed, file=p.stdin, flush=True)
        return [p.stdout.readline().strip() for p in self.processes if p.stdout]

    def kill(self) -> None:
        for p in self.processes:
            p.kill()
            p.communicate()

    def status(self) -> dict[str, Any]:
        done = subprocess.run([*SAMEPAGE, "status", "--json"], env=self.env, capture_output=True, text=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def command(self, *arguments: str) -> None:
        subprocess.run([*SAMEPAGE, *arguments], env=self.env, check=True, capture_output=True)

    def pss(self) -> int:
        return sum(smaps(p.pid, "Pss") for p in self.processes)

    def wait_merged(self) -> float:
        """Seconds until nearly all is merged, as the kernel has it."""
        started = time.monotonic()
        most = self.empty + (MEBIBYTES + 8) * MIB  # samepage is imported later
        while (pss := self.pss()) > most:
            assert time.monotonic() < started + PATIENCE, f"{pss} bytes, not {most}: {self.status()}"
            time.sleep(0.1)
        return time.monotonic() - started


@contextmanager
def overwriters(directory: Path, *options: str) -> Iterator[Overwriters]:
    with private_service(directory, *options) as env:
        them = Overwriters(env)
        try:
            them.tell("fill", 1)
            them.tell("check", 1)
            if all(row["swap"] != "move" for row in them.status()["processes"]):
                pytest.skip("no UFFDIO_MOVE here: pages are swapped by write-protection, which needs no restoring")
            them.wait_merged()
            yield them
        finally:
            them.kill()


@pytest.mark.parametrize("cycles", [3, pytest.param(10, marks=pytest.mark.long)])
def test_what_was_overwritten_with_equal_data_is_merged_again_by_itself(tmp_path: Path, cycles: int) -> None:
    with overwriters(tmp_path) as them:
        for seed in range(2, 2 + cycles):
            them.tell("fill", seed)
            print(f"merged again after {them.wait_merged():.2f} s")
            assert them.tell("check", seed) == ["True", "True"]


def test_after_everything_was_unmerged_too(tmp_path: Path) -> None:
    with overwriters(tmp_path) as them:
        for seed in range(2, 5):
            them.tell("fill", seed)
            them.command("set", "run", "2")
            them.command("set", "run", "1")
            them.wait_merged()
            assert them.tell("check", seed) == ["True", "True"]


def test_after_unmerge_nothing_stands_in_a_segment_any_more(tmp_path: Path) -> None:
    with overwriters(tmp_path) as them:
        them.command("set", "run", "0")
        them.tell("fill", 2)
        pids = [str(p.pid) for p in them.processes]
        for pid in pids:
            them.command("unmerge", "--pid", pid)
            assert "samepage (deleted)" not in Path(f"/proc/{pid}/maps").read_text()
        assert them.tell("check", 2) == ["True", "True"]
        them.command("set", "run", "1")
        them.wait_merged()


def test_a_region_that_was_overwritten_is_merged_again_once_it_was_unmerged_and_registered(tmp_path: Path) -> None:
    with overwriters(tmp_path) as them:
        them.tell("register")
        for seed in range(2, 5):
            them.tell("fill", seed)
            them.tell("unmerge")
            them.tell("register")
            them.wait_merged()
            assert them.tell("check", seed) == ["True", "True"]


def test_an_owner_who_merges_now_need_not_wait_for_it(tmp_path: Path) -> None:
    with overwriters(tmp_path) as them:
        them.tell("register")
        them.tell("fill", 2)
        them.command("set", "run", "0")
        # What somebody holds at the moment (another CPU's list of pages, say) is left for the next call.
        for _ in range(8):
            merged = [int(pages) for pages in them.tell("merge")]
            if min(merged) > 0.98 * PAGES:
                break
        assert min(merged) > 0.98 * PAGES
        assert them.tell("check", 2) == ["True", "True"]
