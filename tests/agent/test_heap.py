"""The heap that brk(2) moves: merged where nobody can take it away unseen, and its bytes are as without the agent."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.agent.headroom import MIB
from tests.agent.preload import Preload, compile_c
from tests.agent.test_headroom_in_cgroups import MemoryCgroup, cgroup

__all__ = ["cgroup"]

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


def test_a_heap_of_which_malloc_discarded_pages_that_were_merged_and_written_is_given_back(
    preload: Preload, heap: str
) -> None:
    said = preload.run([heap, "islands"], merged=True, SAMEPAGE_MEMORY="all").splitlines()
    assert said == ["malloc: merged", "given back: 1"]


def test_the_memory_of_a_heap_is_given_back_where_there_is_none_to_unmerge_it(
    heap: str, cgroup: Callable[..., MemoryCgroup]
) -> None:
    within = cgroup(128 * MIB)
    at_once = ["--set", "advisor_mode=none", "--set", "pages_to_scan=100000"]
    enter = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(within.path / "cgroup.procs")]
    command = [sys.executable, "-m", "samepage", "run", "--memory", "all", *at_once, "--", *enter, heap, "short"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, within.killed()) == (0, 0), done.stderr
    assert done.stdout.splitlines() == ["merged: 1", "alive"]
