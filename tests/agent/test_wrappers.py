"""The wrappers: to a program, memory and processes behave under samepage as the kernel and libc have them.

Most tests run one program with and without the agent and want the same words from it. The kernel's own KSM
answers MADV_MERGEABLE for the run without.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.agent.preload import Preload, compile_c

HERE = Path(__file__).parent
needs_ksm = pytest.mark.skipif(not Path("/sys/kernel/mm/ksm").exists(), reason="needs a kernel with CONFIG_KSM")


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(compile_c(HERE / "calls.c", tmp_path_factory.mktemp("calls") / "calls"))


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(compile_c(HERE / "processes.c", tmp_path_factory.mktemp("processes") / "processes", "-pthread"))


@needs_ksm
@pytest.mark.parametrize("how", [[], ["raw"]], ids=["libc", "syscall"])
def test_every_call_answers_as_the_kernel_does(preload: Preload, calls: str, how: list[str]) -> None:
    kernel = preload.run([calls, *how], bare=True)
    assert kernel.count("EINVAL") > 20
    assert preload.run([calls, *how]) == kernel
    assert preload.run([calls, *how], socket="/nowhere") == kernel


@needs_ksm
@pytest.mark.parametrize("how", [[], ["raw"]], ids=["libc", "syscall"])
def test_every_call_on_merged_pages_answers_as_on_anonymous_memory(
    preload: Preload, calls: str, how: list[str]
) -> None:
    assert preload.run([calls, "merged", *how], merged=True) == preload.run([calls, *how], bare=True)


def test_processes_begin_and_end_as_they_do_without(preload: Preload, processes: str) -> None:
    bare = preload.run([processes], bare=True)
    assert preload.run([processes], socket="/nowhere") == bare
    assert preload.run([processes], merged=True) == bare


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(compile_c(HERE / "bare.c", tmp_path_factory.mktemp("bare") / "bare"))


@pytest.mark.parametrize("what", ["unreadable", "confined"])
def test_calls_that_a_program_makes_by_itself_go_as_they_do_without(preload: Preload, bare: str, what: str) -> None:
    """Those whose arguments cannot be read have EFAULT, and the end is no call that a filter has to allow besides."""
    kernel = preload.run([bare, what], bare=True)
    assert kernel.count("Bad address" if what == "unreadable" else "0x400") >= 3, kernel
    assert preload.run([bare, what]) == kernel
    assert preload.run([bare, what], socket="/nowhere", SAMEPAGE_MEMORY="mapped") == kernel
    assert preload.run([bare, what], merged=True, SAMEPAGE_MEMORY="mapped") == kernel


@pytest.fixture(scope="module")
def memory_merge(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(compile_c(HERE / "memory_merge.c", tmp_path_factory.mktemp("memory_merge") / "memory_merge"))


@needs_ksm
def test_memory_merge_is_answered_inherited_and_kept_over_exec_as_by_the_kernel(
    preload: Preload, memory_merge: str
) -> None:
    kernel = preload.run([memory_merge], bare=True)
    assert "forked: 1" in kernel
    assert kernel.count("executed: 1") == 2
    assert preload.run([memory_merge], socket="/nowhere") == kernel


def test_memory_merge_takes_in_what_was_mapped_before_and_what_comes(preload: Preload, memory_merge: str) -> None:
    assert preload.run([memory_merge, "merged"], merged=True).splitlines() == [
        "set: 0 ",
        "mapped before: 262144 bytes merged",
        "mapped after: 262144 bytes merged",
        "unmergeable: 0 ",
        "then: 262144 and 0 bytes merged",
        "cleared: 0 ",
        "then: 0 and 0 bytes merged",
        "intact: 1 1 1",
    ]


@pytest.mark.parametrize(
    ("memory", "merged"),
    [
        ("", ["1 MiB"]),
        ("large", ["1 MiB"]),
        ("mapped", ["1 MiB", "mapped", "beside it"]),
        ("all", ["1 MiB", "96 KiB", "mapped", "beside it"]),
    ],
)
def test_what_is_merged_of_a_program_that_says_nothing_is_what_samepage_run_says(
    preload: Preload, memory_merge: str, memory: str, merged: list[str]
) -> None:
    said = preload.run([memory_merge, "told"], merged=True, SAMEPAGE_MEMORY=memory)
    words = dict(line.split(": ") for line in said.splitlines())
    assert [what for what, became in words.items() if became == "merged"] == merged
    assert [what for what, became in words.items() if became == "left alone"]
    assert (words["the kernel's flag"], words["cleared"], words["unmergeable"]) == ("0 ", "0 ", "0 ")
    assert words["intact"] == "1 1"


@pytest.mark.parametrize(("memory", "became"), [("large", 0), ("mapped", 1), ("all", 1)])
def test_what_is_taken_before_the_agents_constructor_runs_is_like_what_is_taken_after(
    preload: Preload, tmp_path: Path, memory: str, became: int
) -> None:
    library = compile_c(HERE / "early.c", tmp_path / "libearly.so", "-DLIBRARY", "-shared", "-fPIC")
    program = compile_c(HERE / "early.c", tmp_path / "early", str(library), f"-Wl,-rpath,{tmp_path}")
    command = [str(program), "1000" if became else "100"]
    said = preload.run(command, merged=True, SAMEPAGE_MEMORY=memory).splitlines()
    assert said == [f"mapped: {became}, taken: {became}", "intact: 1 1 1 1"]


HANDLERS = """
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
static void *use(void *arg) { char *p = malloc(4 << 20); memset(p, 1, 4 << 20); free(p); return arg; }
/* As OpenBLAS does: waits, before a fork, for threads that allocate. */
static void handler(void) { pthread_t t; pthread_create(&t, NULL, use, NULL); pthread_join(t, NULL); use(NULL); }
__attribute__((constructor)) static void early(void) { pthread_atfork(handler, handler, handler); }
void late(void) { pthread_atfork(handler, handler, handler); }
"""

FORKS = """
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>
extern void late(void);
int main(void)
{
	int status = 0;
	late();
	for (int i = 0; i < 50 && !status; i++) {
		pid_t pid = fork();
		if (!pid)
			_exit(0);
		waitpid(pid, &status, 0);
	}
	printf("%d\\n", status);
	return 0;
}
"""


def test_fork_handlers_may_allocate_and_wait_for_threads_that_do(preload: Preload, tmp_path: Path) -> None:
    """Those of libraries, too, whose constructors run before the agent's."""
    (tmp_path / "handlers.c").write_text(HANDLERS)
    (tmp_path / "forks.c").write_text(FORKS)
    library = compile_c(tmp_path / "handlers.c", tmp_path / "libhandlers.so", "-shared", "-fPIC", "-pthread")
    program = compile_c(tmp_path / "forks.c", tmp_path / "forks", str(library), f"-Wl,-rpath,{tmp_path}")
    assert preload.run([str(program)], merged=True) == "0\n"


@pytest.mark.parametrize(
    "command",
    [
        ["ls", "-l", "/etc"],
        ["git", "--version"],
        ["gcc", "-xc", "/dev/null", "-E"],
        ["sh", "-c", "seq 100000 | sort -R | sort -n | tail -1"],
        [sys.executable, "-c", "import subprocess; print(subprocess.run(['true']).returncode)"],
        [sys.executable, "-c", "import multiprocessing as m; print(m.get_context('fork').Pool(3).map(abs, [-1, 2]))"],
    ],
    ids=lambda command: Path(command[0]).name,
)
def test_everyday_programs_print_what_they_always_do(preload: Preload, command: list[str]) -> None:
    bare = preload.run(command, bare=True)
    assert preload.run(command) == bare
    assert preload.run(command, merged=True, SAMEPAGE_MIN_ALLOC="65536") == bare


def test_a_compiler_makes_the_same_program_under_the_agent(preload: Preload, tmp_path: Path) -> None:
    for name in ("with", "without"):
        compiler = ["gcc", "-O2", "-c", str(HERE / "calls.c"), "-o", str(tmp_path / name)]
        preload.run(compiler, merged=name == "with", bare=name == "without")
    assert (tmp_path / "with").read_bytes() == (tmp_path / "without").read_bytes()


def test_loaded_late_the_library_interposes_nothing(preload: Preload) -> None:
    """As `import samepage` loads it."""
    program = f"import ctypes; ctypes.CDLL({str(preload.library)!r}); import numpy as np; print(np.ones(1 << 20).sum())"
    command = [sys.executable, "-c", program]
    assert preload.run(command, bare=True, SAMEPAGE_SOCKET="/nowhere") == "1048576.0\n"


def test_only_what_libc_has_and_the_c_api_is_exported(preload: Preload) -> None:
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", str(preload.library)], capture_output=True, text=True, check=True
    )
    names = {line.split()[-1] for line in listed.stdout.splitlines()}
    ours = {name for name in names if name.startswith("samepage_")}
    assert ours
    assert names - ours <= {
        *("malloc", "calloc", "realloc", "reallocarray", "free", "cfree", "posix_memalign", "aligned_alloc"),
        *("memalign", "valloc", "pvalloc", "malloc_usable_size", "malloc_trim", "mallopt"),
        *("mmap", "mmap64", "munmap", "mremap", "mprotect", "pkey_mprotect", "madvise"),
        *("process_madvise", "shmat", "brk", "sbrk", "mseal"),  # mseal: not in every libc yet
        *("mlock", "mlock2", "munlock", "mlockall", "munlockall"),
        *("setrlimit", "setrlimit64", "prlimit", "prlimit64"),
        *("setuid", "seteuid", "setreuid", "setresuid", "setgid", "setegid", "setregid", "setresgid", "setgroups"),
        *("initgroups", "setfsuid", "setfsgid", "capset", "chroot"),
        *("dl_iterate_phdr", "pthread_attr_setstack", "pthread_attr_setstackaddr", "pthread_mutex_init"),
        *("_Fork", "clone", "unshare", "setns", "__register_atfork", "prctl", "ioctl", "syscall"),
    }
