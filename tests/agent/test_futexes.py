"""The kernel writes a futex, and moves pages for a program, where it does not wait for pages that are away."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.agent.preload import compile_c

FAST = ["--set", "sleep_millisecs=0", "--set", "advisor_mode=none", "--set", "pages_to_scan=1000000"]


@pytest.fixture(scope="module")
def futexes(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(compile_c(Path(__file__).parent / "futexes.c", tmp_path_factory.mktemp("futexes") / "futexes"))


@pytest.mark.parametrize("how", ["pi", "wake_op", "moves"])
def test_no_call_fails_because_its_page_is_being_merged(futexes: str, how: str) -> None:
    two = ["sh", "-c", '"$0" "$1" & "$0" "$1"; wait', futexes, how]
    done = subprocess.run(["samepage", "run", *FAST, "--", *two], stdout=subprocess.PIPE, text=True, check=True)
    if done.stdout == 2 * "failed: -3\n":
        pytest.skip("no UFFDIO_MOVE here")
    assert done.stdout == 2 * "failed: 0\n"
