"""A program whose memory is merged, written and restored all the time: its pages are away as often as can be."""

from __future__ import annotations

import select
from pathlib import Path

import numpy as np
import pytest

from samepage.memory import AREA
from samepage.memory.wire import Swap
from tests.agent.asked import Process
from tests.agent.merge_all import merge_pages
from tests.agent.preload import Preload

PAGES = 1024


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
