"""Whatever the kernel refuses a process, its pages get home: no byte is wrong, nobody sleeps for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.agent.preload import ROOT, SOURCES, Preload, compile_c

LIMITS = ["data", "data-below", "as", "as-below", "memlock", "mappings", "mappings-few"]
"""Reached as soon as there is something merged; "below": the process has more than it may have."""

LOCKS = [
    "current",
    "current-unlock",
    "current-inline",
    "current-inline-unlock",
    "current-onfault",
    "future",
    "future-inline",
    "current-future-inline",
    "current-future-onfault-inline",
    "memlock-current-inline",
    "mlock2-inline",
    "mlock2-onfault",
]
"""mlockall(2) and mlock2(2), "inline" by system calls that pass no wrapper."""


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("refused") / "refused"
    return compile_c(ROOT / "tests" / "agent" / "refused.c", built, f"-I{SOURCES}", "-pthread")


@pytest.mark.parametrize("how", LIMITS)
def test_a_limit_that_is_reached_while_merging_costs_no_byte(preload: Preload, refused: Path, how: str) -> None:
    preload.run([str(refused), how], merged=True)


@pytest.mark.parametrize("how", LOCKS)
def test_memory_that_is_locked_while_merging_is_left_as_it_is(preload: Preload, refused: Path, how: str) -> None:
    preload.run([str(refused), how], merged=True)
