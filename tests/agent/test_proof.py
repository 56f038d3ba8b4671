"""What the agent answers when it is to prove that a process has a page."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from samepage.memory import PAGE_SIZE, AddressSpaceGone, PageStatus, wire
from samepage.memory.proof import AT_MOST, expected
from tests.agent.asked import Process
from tests.agent.preload import Preload


@pytest.fixture
def process(preload: Preload, tmp_path: Path) -> Iterator[Process]:
    process = Process(preload, tmp_path)
    yield process
    process.end()


def page(number: int) -> bytes:
    """As `asked.PROGRAM` fills it."""
    return (number * PAGE_SIZE).to_bytes(8, "little").ljust(PAGE_SIZE, b"\0")


def test_a_proof_is_the_keyed_hash_of_the_page(process: Process) -> None:
    first = process.address // PAGE_SIZE
    for pages in ([5], [2047, 0, 5, 511, 512], list(range(2048))):
        key = os.urandom(wire.KEY_SIZE)
        status, proofs = process.space._prove(key, np.array(pages, np.uint64) + np.uint64(first))
        assert not status.any()
        assert proofs == [expected(key, page(number)) for number in pages]


def test_of_what_is_not_there_or_not_to_be_merged_nothing_is_proved(process: Process) -> None:
    first = process.address // PAGE_SIZE
    with open(f"/proc/{process.process.pid}/maps") as maps:
        libc = next(int(line.split("-")[0], 16) for line in maps if "libc" in line) // PAGE_SIZE
    status, proofs = process.space._prove(b"k" * wire.KEY_SIZE, np.array([0, 1, libc, first + 3], np.uint64))
    assert status.tolist() == [PageStatus.GONE] * 3 + [PageStatus.DONE]
    assert proofs[:3] == [bytes(wire.PROOF_SIZE)] * 3


@pytest.mark.parametrize("vpns", [[1 << 52], [(1 << 64) - 1], [0] * (AT_MOST + 1)])
def test_a_question_that_makes_no_sense_ends_the_connection(process: Process, vpns: list[int]) -> None:
    with pytest.raises(AddressSpaceGone):
        process.space._prove(b"k" * wire.KEY_SIZE, np.array(vpns, np.uint64))
