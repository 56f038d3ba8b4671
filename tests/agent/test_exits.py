"""The kernel finds what it writes of a thread that ends, which cannot wait for a page."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.agent.merged_and_restored import while_merged_and_restored
from tests.agent.preload import Preload, compile_c


@pytest.fixture(scope="module")
def exits(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(compile_c(Path(__file__).parent / "exits.c", tmp_path_factory.mktemp("exits") / "exits", "-pthread"))


def test_a_thread_that_ends_leaves_no_robust_mutex_locked(preload: Preload, tmp_path: Path, exits: str) -> None:
    assert while_merged_and_restored(preload, tmp_path, [exits, "mutexes"]) == "not told of 0\n"


def test_a_thread_on_a_stack_of_the_programs_is_joined(preload: Preload, tmp_path: Path, exits: str) -> None:
    assert while_merged_and_restored(preload, tmp_path, [exits, "stacks"]) == "not joined 0\n"


def test_the_end_of_a_stack_of_which_the_program_says_only_that_is_left_in_its_place(
    preload: Preload, exits: str
) -> None:
    assert preload.run([exits, "end"], merged=True) == "merged: 1, of the stack's end: 0\n"
