"""Programs that were built with a sanitizer start under the agent and are left alone, which one line says."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.agent.preload import Preload

PROGRAM = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
int main(int argc, char **argv)
{
	char *p = malloc(4 << 20), *q = mmap(NULL, 1 << 20, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), *leak;
	int status = 0;
	memset(p, 1, 4 << 20);
	p = realloc(p, 8 << 20);
	q[5] = 1;
	munmap(q, 1 << 20);
	if (!fork())
		_exit(p[100]);
	wait(&status);
	printf("%d %d\n", p[100], status);
	fflush(stdout);
	free(p);
	if (argc == 1)
		return 0;
	if (*argv[1] == 'c')
		execl(argv[0], argv[0], NULL);
	leak = malloc(10);
	if (*argv[1] == 'o')
		leak[argc + 9] = 1;
	if (leak[0] & 1)
		puts("odd");
	leak = NULL;
	return 0;
}
"""
SETTINGS = {"ASAN_OPTIONS": "symbolize=0:detect_leaks=0", "LSAN_OPTIONS": "symbolize=0", "MSAN_OPTIONS": "symbolize=0"}


def build(directory: Path, compiler: str, sanitizer: str) -> str:
    program = directory / "program"
    (directory / "program.c").write_text(PROGRAM)
    command = [compiler, "-w", "-O1", f"-fsanitize={sanitizer}", str(directory / "program.c"), "-o", str(program)]
    if shutil.which(compiler) is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"needs {compiler} with the {sanitizer} sanitizer")
    return str(program)


def run(preload: Preload, command: list[str], *, bare: bool) -> tuple[int, str, list[str]]:
    environment = os.environ | SETTINGS
    if not bare:
        environment |= {"LD_PRELOAD": str(preload.library), "SAMEPAGE_SOCKET": preload.merge_all}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr.splitlines()


NAMES = {"address": "AddressSanitizer", "thread": "ThreadSanitizer", "leak": "LeakSanitizer"}
NAMES |= {"memory": "MemorySanitizer"}


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("sanitizer", NAMES)
def test_it_starts_and_is_left_alone(preload: Preload, tmp_path: Path, compiler: str, sanitizer: str) -> None:
    program = build(tmp_path, compiler, sanitizer)
    line = f"samepage: program was built with {NAMES[sanitizer]}, and is left alone"
    for command in ([program], [program, "child"]):
        status, out, err = run(preload, command, bare=True)
        assert (status, err) == (0, [])
        # One line for each program that is executed; a child that was only forked is none.
        assert run(preload, command, bare=False) == (status, out, [line] * len(command))


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize(
    ("sanitizer", "fault"), [("address", "overflow"), ("leak", "leak"), ("memory", "uninitialised")]
)
def test_it_finds_what_it_is_for(preload: Preload, tmp_path: Path, compiler: str, sanitizer: str, fault: str) -> None:
    program = build(tmp_path, compiler, sanitizer)
    status, out, _ = run(preload, [program, fault], bare=True)
    assert status
    with_agent = run(preload, [program, fault], bare=False)
    assert with_agent[:2] == (status, out)
    assert [line for line in with_agent[2] if "ERROR" in line or "WARNING" in line] != []


def test_one_whose_options_say_otherwise_starts_too(preload: Preload, tmp_path: Path) -> None:
    """A program's own __asan_default_options and a user's ASAN_OPTIONS stay in force."""
    own = 'const char *__asan_default_options(void) { return "exitcode=77:detect_leaks=0"; }\n'
    (tmp_path / "own.c").write_text(own + PROGRAM)
    command = ["gcc", "-w", "-fsanitize=address", str(tmp_path / "own.c"), "-o", str(tmp_path / "own")]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs gcc with libasan")
    assert run(preload, [str(tmp_path / "own")], bare=False)[0] == 0
    assert run(preload, [str(tmp_path / "own"), "overflow"], bare=False)[0] == 77


def test_undefined_behaviour_is_looked_for_in_merged_memory(preload: Preload, tmp_path: Path) -> None:
    program = build(tmp_path, "gcc", "undefined")
    assert run(preload, [program], bare=False) == run(preload, [program], bare=True)
