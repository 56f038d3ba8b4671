"""Many areas: the books the agent keeps of a program's memory hold whatever the program does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.agent.preload import Preload, compile_c

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def many_areas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_c(HERE / "many_areas.c", tmp_path_factory.mktemp("many_areas") / "many_areas", "-fno-builtin")


@pytest.mark.parametrize("what", ["blocks", "neighbours", "holes"])
@pytest.mark.parametrize("merged", [False, True])
def test_many_areas_come_and_go_and_no_byte_of_the_programs_changes(
    preload: Preload, many_areas: Path, what: str, merged: bool
) -> None:
    socket = "" if merged else "/nowhere"
    preload.run([str(many_areas), what, "6000"], merged=merged, socket=socket, SAMEPAGE_MIN_ALLOC=str(64 << 10))
