"""A virtual machine's guest runs on while its memory is merged."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from samepage.memory import AREA, EXTENT, PageStatus
from samepage.memory.wire import Flags
from tests.agent.asked import Process
from tests.agent.preload import ROOT, Preload, compile_c

PAGES = 2048
GUEST_SECONDS = 0.03
"""Between two slices of merging (GUEST_MS in agent/merge.c), of 512 pages at most."""


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("needs /dev/kvm")
    return compile_c(ROOT / "benchmarks" / "bench" / "guest.c", tmp_path_factory.mktemp("guest") / "guest")


def test_a_guest_has_most_of_the_time_to_itself_while_its_memory_is_merged(
    preload: Preload, guest: Path, tmp_path: Path
) -> None:
    process = Process(preload, tmp_path, command=[str(guest), "16", "3", "0"])
    first = process.address // 4096 + 16  # behind its program
    donation = process.space.donate(np.array([(first, PAGES)], AREA))
    assert (donation.status == PageStatus.DONE).all()
    started = time.monotonic()
    merged = process.space.merge(donation.segment, np.array([(first, PAGES, 0)], EXTENT))
    took = time.monotonic() - started
    assert (merged.status == PageStatus.DONE).all()
    assert took > 3 * GUEST_SECONDS
    assert merged.cpu_ns / 1e9 < took / 2
    rounds, _, wrong = json.loads(process.line())
    assert (rounds > 0, wrong) == (True, 0)
    process.end()


@pytest.mark.parametrize("way", [Flags(0), Flags.SWAP_WP], ids=["move", "write-protect"])
def test_no_word_is_lost_that_a_guest_writes_while_its_memory_is_merged_and_unmerged(
    preload: Preload, guest: Path, tmp_path: Path, way: Flags
) -> None:
    process = Process(preload, tmp_path, command=[str(guest), "4", "4", "0", "5"], flags=way)
    pages, first = 512, process.address // 4096 + 256
    area = np.array([(first, pages)], AREA)
    merged = different = 0
    ends = time.monotonic() + 3
    while time.monotonic() < ends:
        donation = process.space.donate(area)
        at = np.flatnonzero(donation.status == PageStatus.DONE)
        if donation.segment is None:
            continue
        extents = np.array([(first + page, 1, n) for n, page in enumerate(at)], EXTENT)
        status = process.space.merge(donation.segment, extents).status
        merged += int(np.count_nonzero(status == PageStatus.DONE))
        different += int(np.count_nonzero(status == PageStatus.DIFFERENT))
        process.space.break_ksm(first, pages)
        donation.segment.close()
    rounds, _, wrong = json.loads(process.line())
    assert wrong == 0
    assert merged > pages / 8  # on a busy machine it gets no further
    assert different > 0, "the guest wrote to none of them meanwhile"
    assert rounds > 10
    process.end()
