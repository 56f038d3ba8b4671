"""The agent built to check itself (-Ddebug_checks=true): its books are true whenever it lets its lock go."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.agent.preload import Preload, build_agent, compile_c
from tests.agent.test_torture import WAYS, crowd, torture

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory, preload: Preload) -> Preload:
    return Preload(build_agent(tmp_path_factory.mktemp("checked"), "-DSAMEPAGE_CHECK"), preload.merge_all)


@pytest.mark.parametrize("what", ["blocks", "neighbours", "holes"])
def test_the_books_are_true_with_many_areas(checked: Preload, tmp_path: Path, what: str) -> None:
    program = compile_c(HERE / "many_areas.c", tmp_path / "many_areas", "-fno-builtin")
    checked.run([str(program), what, "3000"], merged=True, SAMEPAGE_MIN_ALLOC=str(64 << 10))


def test_the_books_are_true_while_blocks_come_and_go_and_are_merged(checked: Preload, tmp_path: Path) -> None:
    program = compile_c(HERE / "blocks.c", tmp_path / "blocks", "-fno-builtin", "-lpthread")
    checked.run([str(program), str(64 << 10), "1000", "3"], merged=True, SAMEPAGE_MIN_ALLOC=str(64 << 10))


@pytest.mark.parametrize("way", ["move", "write-protect-untracked", "huge pages"])
def test_the_books_are_true_while_memory_is_merged_and_broken_without_end(
    checked: Preload, tmp_path: Path, way: str
) -> None:
    torture(checked, tmp_path, WAYS[way], seconds=4, seed=4)


def test_the_books_are_true_in_a_crowd_of_tens_of_thousands_of_areas(checked: Preload, tmp_path: Path) -> None:
    crowd(checked, tmp_path, WAYS["move"], seconds=6, seed=1)


def test_the_books_are_true_whatever_is_called_and_over_forks(checked: Preload, tmp_path: Path) -> None:
    calls = str(compile_c(HERE / "calls.c", tmp_path / "calls"))
    processes = str(compile_c(HERE / "processes.c", tmp_path / "processes", "-pthread"))
    checked.run([calls, "merged"], merged=True)
    assert checked.run([processes], merged=True) == checked.run([processes], bare=True)


UNSEEN = """
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>

int main(void)
{
    char *p = malloc(1 << 20);
    int file = open("/proc/self/exe", O_RDONLY);
    register long flags asm("r10") = MAP_PRIVATE | MAP_FIXED;
    register long fd asm("r8") = file;
    register long offset asm("r9") = 0;
    long ret;

    asm volatile("syscall"
                 : "=a"(ret)
                 : "a"(9), "D"(p), "S"(4096), "d"(PROT_READ), "r"(flags), "r"(fd), "r"(offset)
                 : "rcx", "r11", "memory");
    for (int i = 0; ret == (long)p && i < 1000; i++)
        mprotect(p, 4096, PROT_READ);
    return 0;
}
"""


def test_a_check_that_fails_says_so_in_one_line_and_aborts(checked: Preload, tmp_path: Path) -> None:
    (tmp_path / "unseen.c").write_text(UNSEEN)
    program = compile_c(tmp_path / "unseen.c", tmp_path / "unseen", "-fno-builtin")
    environment = os.environ | {"LD_PRELOAD": str(checked.library), "SAMEPAGE_SOCKET": "/nowhere"}
    done = subprocess.run([str(program)], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGABRT
    assert done.stderr.startswith("samepage: ")
    assert done.stderr.count("\n") == 1
    assert "check.c" in done.stderr
