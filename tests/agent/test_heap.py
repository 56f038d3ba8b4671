"""The heap that brk(2) moves: merged where nobody can take it away unseen, and its bytes are as without the agent."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.agent.preload import Preload, compile_c

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def heap(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(compile_c(HERE / "heap.c", tmp_path_factory.mktemp("heap") / "heap", "-pthread", "-fno-builtin"))


@pytest.mark.parametrize("memory", ["mapped", "all"])
def test_what_a_program_takes_by_sbrk_is_merged_and_zeros_when_it_is_taken_again(
    preload: Preload, heap: str, memory: str
) -> None:
    said = preload.run([heap, "sbrk"], merged=True, SAMEPAGE_MEMORY=memory).splitlines()
    assert said == ["taken: merged", "zeros: 1, kept: 1", "taken again: merged", "intact: 1"]


@pytest.mark.parametrize("how", ["malloc", "trim"])
def test_small_blocks_are_merged_with_all_and_given_back_and_calloc_gives_zeros(
    preload: Preload, heap: str, how: str
) -> None:
    said = preload.run([heap, how], merged=True, SAMEPAGE_MEMORY="all").splitlines()
    assert said == ["malloc: merged", "wrong: 0, given back: 1"]


def test_small_blocks_are_left_alone_with_mapped_and_given_back(preload: Preload, heap: str) -> None:
    said = preload.run([heap, "trim", "alone"], merged=True, SAMEPAGE_MEMORY="mapped").splitlines()
    assert said == ["malloc: left alone", "wrong: 0, given back: 1"]


def test_no_byte_is_wrong_in_a_heap_that_grows_and_shrinks_under_threads(preload: Preload, heap: str) -> None:
    said = preload.run([heap, "storm", "8"], merged=True, SAMEPAGE_MEMORY="all").splitlines()
    assert said == ["merged: some, wrong: 0"]
