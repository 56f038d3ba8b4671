"""What depends on the processor, on this one, and on aarch64 as far as an emulator of user programs goes.

By that no userfaultfd is to be had, so nothing is merged there; and it makes no thread as the agent's is.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.agent.preload import SOURCES, build_agent, compile_c
from tests.agent.test_areas import model
from tests.agent.test_system import own_functions

HERE = Path(__file__).parent
CROSS = "aarch64-linux-gnu-gcc"
EMULATOR = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]


def probe(folder: Path, machine: str, compiler: str, *flags: str) -> Path:
    parts = [str(path) for path in (SOURCES / "arch" / machine).glob("*.c") if path.name != "memory.c"]
    return compile_c(HERE / "task_probe.c", folder / "probe", f"-I{SOURCES}", *parts, *flags, compiler=compiler)


def output(*command: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=100, check=True).stdout


@pytest.fixture
def headers(tmp_path: Path) -> str:
    """xxHash's, which Debian keeps where all others are of this machine."""
    for tool in (CROSS, EMULATOR[0]):
        if not shutil.which(tool):
            pytest.skip(f"needs {tool}")
    folder = tmp_path / "include"
    folder.mkdir()
    for name in ("xxhash.h", "xxh3.h"):
        if (Path("/usr/include") / name).exists():
            (folder / name).symlink_to(Path("/usr/include") / name)
    return f"-I{folder}"


def test_a_new_task_has_a_stack_and_an_errno_of_its_own(tmp_path: Path) -> None:
    output(str(probe(tmp_path, platform.machine(), "gcc")))


def test_on_aarch64_too_and_the_hash_is_the_same(tmp_path: Path, headers: str) -> None:
    here = output(str(probe(tmp_path, platform.machine(), "gcc")))
    assert output(*EMULATOR, str(probe(tmp_path, "aarch64", CROSS, headers))) == here


def test_on_aarch64_memory_and_text_are_handled_as_by_libc(tmp_path: Path, headers: str) -> None:
    assert output(*EMULATOR, str(own_functions(tmp_path, "-O3", "aarch64", "aarch64-linux-gnu-"))) == "the same\n"


@pytest.mark.parametrize(
    ("name", "books"),
    [
        ("areas_model", ["base/area", "base/area_set", "base/planes", "base/check", "arch/aarch64/task"]),
        ("blocks_model", ["hooks/block_set", "arch/aarch64/task"]),
    ],
)
def test_on_aarch64_the_books_say_what_a_model_says(tmp_path: Path, headers: str, name: str, books: list[str]) -> None:
    output(*EMULATOR, str(model(tmp_path, name, books, [], CROSS)), "5000", "1")


@pytest.mark.parametrize("page_size", [4 << 10, 16 << 10, 64 << 10])
def test_on_aarch64_programs_run_with_the_agent_whatever_the_size_of_a_page(
    tmp_path: Path, headers: str, page_size: int
) -> None:
    agent = build_agent(tmp_path, headers, compiler=CROSS, machine="aarch64")
    emulator = [*EMULATOR, "-p", str(page_size), "-E", f"LD_PRELOAD={agent}"]
    emulator += ["-E", "SAMEPAGE_SOCKET=/nowhere", "-E", "SAMEPAGE_MIN_ALLOC=65536"]
    many_areas = compile_c(HERE / "many_areas.c", tmp_path / "many_areas", "-fno-builtin", compiler=CROSS)
    for what in ("blocks", "neighbours", "holes"):
        output(*emulator, str(many_areas), what, "300")
    (tmp_path / "aligned.c").write_text(ALIGNED)
    aligned = compile_c(tmp_path / "aligned.c", tmp_path / "aligned", "-fno-builtin", compiler=CROSS)
    assert output(*emulator, str(aligned)) == f"{page_size} 0\n"


ALIGNED = """
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

int main(void)
{
    long size = sysconf(_SC_PAGESIZE);
    uintptr_t off = 0;

    for (int i = 0; i < 8; i++)
        off |= (uintptr_t)malloc(100 << 10) % (uintptr_t)size;
    printf("%ld %lu\\n", size, (unsigned long)off);
}
"""
