"""Calls that change memory and are seldom made, or made behind libc's back: merged memory is as any other."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.agent.preload import SOURCES, Preload, compile_c

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def attach(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(compile_c(HERE / "attach.c", tmp_path_factory.mktemp("attach") / "attach", f"-I{SOURCES}"))


@pytest.mark.parametrize("how", [[], ["raw"]], ids=["libc", "syscall"])
@pytest.mark.parametrize("what", ["process_madvise", "mseal", "shmat", "brk"])
def test_a_call_that_is_seldom_made_finds_merged_memory_as_the_kernel_would(
    preload: Preload, attach: str, what: str, how: list[str]
) -> None:
    kernel = preload.run([attach, what, *how], bare=True)
    assert kernel
    assert preload.run([attach, what, *how], socket="/nowhere") == kernel
    assert preload.run([attach, what, "merged", *how], merged=True) == kernel


@pytest.mark.parametrize("what", ["mapped inline", "changed inline", "forked inline"])
def test_what_is_mapped_behind_libcs_back_is_not_touched(preload: Preload, attach: str, what: str) -> None:
    kernel = preload.run([attach, what], bare=True)
    assert kernel
    assert preload.run([attach, what, "merged"], merged=True) == kernel
