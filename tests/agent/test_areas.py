"""Many areas: the books the agent keeps of a program's memory hold whatever the program does."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.agent.preload import SOURCES, Preload, compile_c

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


def test_merged_memory_is_known_when_there_is_no_memory_to_write_it_down(preload: Preload, many_areas: Path) -> None:
    preload.run([str(many_areas), "limit", "20000"], merged=True)


def test_a_mapping_costs_no_more_when_there_are_thirty_thousand(preload: Preload, many_areas: Path) -> None:
    def microseconds(count: int) -> float:
        return min(float(preload.run([str(many_areas), "stacks", str(count)], socket="/nowhere")) for _ in range(3))

    assert microseconds(30_000) < 2.5 * microseconds(5_000)


SANITIZED = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
"""Also where the agent cannot be: in a program of their own its books run under AddressSanitizer."""


def model(folder: Path, name: str, books: Sequence[str], flags: Sequence[str], compiler: str = "gcc") -> Path:
    sources = [str(SOURCES / f"{book}.c") for book in books]
    options = ["-DSAMEPAGE_CHECK", f"-I{SOURCES}", *sources, *flags]
    return compile_c(HERE / f"{name}.c", folder / name, *options, compiler=compiler)


@pytest.fixture(scope="module", params=[[], SANITIZED], ids=["plain", "sanitized"])
def areas_model(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    books = ["base/area", "base/area_set", "base/planes", "base/check"]
    return model(tmp_path_factory.mktemp("areas_model"), "areas_model", books, request.param)


@pytest.mark.parametrize("seed", range(1, 4))
def test_the_set_of_large_blocks_says_of_every_page_what_a_model_says(tmp_path: Path, seed: int) -> None:
    program = model(tmp_path, "blocks_model", ["hooks/block_set"], SANITIZED)
    done = subprocess.run([str(program), "20000", str(seed)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_a_block_that_is_kept_without_the_lock_has_one_user_at_a_time(tmp_path: Path, sanitizer: str) -> None:
    flags = ["-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-pthread"]
    program = model(tmp_path, "kept_model", ["hooks/kept"], flags)
    done = subprocess.run([str(program), "4", "50000"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("memory", [[], ["short"]], ids=["plenty", "short"])
def test_the_books_say_of_every_page_what_a_model_says(areas_model: Path, seed: int, memory: list[str]) -> None:
    done = subprocess.run([str(areas_model), "20000", str(seed), *memory], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr


def test_before_6_11_who_asks_for_all_mappings_reads_the_file_once(tmp_path: Path) -> None:
    program = compile_c(
        HERE / "maps_reader.c", tmp_path / "maps_reader", f"-I{SOURCES}", str(SOURCES / "base" / "maps.c")
    )
    done = subprocess.run([str(program), "20000"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout
