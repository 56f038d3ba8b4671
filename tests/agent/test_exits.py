"""The kernel finds what it writes of a thread that ends, which cannot wait for a page."""

from __future__ import annotations

import select
from pathlib import Path

import numpy as np
import pytest

from samepage.memory import AREA
from samepage.memory.wire import Swap
from tests.agent.asked import Process
from tests.agent.merge_all import merge_pages
from tests.agent.preload import Preload, compile_c

PAGES = 1024


@pytest.fixture(scope="module")
def exits(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(compile_c(Path(__file__).parent / "exits.c", tmp_path_factory.mktemp("exits") / "exits", "-pthread"))


def while_merged_and_restored(preload: Preload, folder: Path, command: list[str]) -> str:
    """What the program says after its memory was merged, written and restored again and again."""
    process = Process(preload, folder, command=command)
    if process.space.swap != Swap.MOVE:
        pytest.skip("no UFFDIO_MOVE here")
    first, out = process.address // 4096, process.process.stdout
    assert out is not None
    while not select.select([out], [], [], 0)[0]:
        merge_pages(process.space, np.arange(first, first + PAGES))
        for _ in range(3):
            process.space.scan(first, PAGES)
            process.space.restore(np.array([(first, PAGES)], AREA))
    line = process.line()
    process.end()
    return line


def test_a_thread_that_ends_leaves_no_robust_mutex_locked(preload: Preload, tmp_path: Path, exits: str) -> None:
    assert while_merged_and_restored(preload, tmp_path, [exits, "mutexes"]) == "not told of 0\n"


def test_a_thread_on_a_stack_of_the_programs_is_joined(preload: Preload, tmp_path: Path, exits: str) -> None:
    assert while_merged_and_restored(preload, tmp_path, [exits, "stacks"]) == "not joined 0\n"
