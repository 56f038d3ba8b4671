"""samepage.attach(): a program that was not started by `samepage run`, and those that it starts."""

from __future__ import annotations

import ctypes.util
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from samepage import agent
from samepage.service.scanner import Scanner
from tests.service.serving import serving

pytestmark = pytest.mark.skipif(
    not agent.library_path().exists(), reason=f"needs the agent, and there is no {agent.library_path()}"
)

PRELUDE = """
import errno, multiprocessing, os, sys, time
import numpy as np
import samepage

def table():
    return np.random.default_rng(7).integers(0, 1 << 60, 1 << 20)  # 8 MiB

def handler(array):
    return np._core.multiarray.get_handler_name(array)

def in_files():
    "Bytes of this process that are mapped from segments."
    lines = open("/proc/self/smaps").read().splitlines()
    found = 0
    for at, line in enumerate(lines):
        if "/memfd:samepage" in line:
            found += next(int(l.split()[1]) for l in lines[at:] if l.startswith("Rss:")) << 10
    return found

def merged(least):
    for _ in range(600):
        if in_files() >= least:
            return True
        time.sleep(0.05)
    return False
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "socket")


@pytest.fixture
def scanner(path: str) -> Iterator[Scanner]:
    with serving(path) as scanner:
        yield scanner


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Starts a program after `PRELUDE`, without anything of samepage in its environment."""

    def start(program: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("SAMEPAGE_", "LD_PRELOAD"))}
        environment |= {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "XDG_RUNTIME_DIR": str(tmp_path)}
        file = tmp_path / f"program{len(list(tmp_path.iterdir()))}.py"
        file.write_text(PRELUDE + textwrap.dedent(program))
        return subprocess.Popen(
            [sys.executable, file, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | variables,
        )

    return start


def ended(process: subprocess.Popen[str]) -> str:
    """What a program printed that ends well."""
    out, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    assert errors == ""
    return out


def test_arrays_of_programs_that_attach_are_merged_and_keep_their_bytes(
    start: Start, scanner: Scanner, path: str
) -> None:
    program = """
        early = table()
        samepage.attach(sys.argv[1])
        array = table()
        assert (handler(early), handler(array)) == ("default_allocator", "samepage")
        assert merged(7 << 20), in_files()
        assert (array == early).all()
        array[::1000] += 1
        early[::1000] += 1
        print("merged", flush=True)
        sys.stdin.read()
        assert (array == early).all()
    """
    both = [start(program, path) for _ in range(2)]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "merged\n", process.communicate()
    assert scanner.counters()["pages_sharing"] > 0
    for process in both:
        ended(process)


def test_what_is_resized_freed_and_made_before_comes_from_where_it_belongs(
    start: Start, scanner: Scanner, path: str
) -> None:
    ended(
        start(
            """
            early = [np.full(n, n % 251, np.uint8) for n in (10, 5000, 3 << 20)]
            samepage.attach(sys.argv[1])
            samepage.attach(sys.argv[1])  # once more does no harm
            rng = np.random.default_rng(1)
            kept = {}
            for turn in range(3000):
                key, size = int(rng.integers(24)), int(1 << rng.integers(4, 23)) + int(rng.integers(9000))
                what = rng.integers(5)
                if what < 2 or key not in kept:
                    array = np.zeros(size, np.uint8) if what else np.empty(size, np.uint8)
                    assert not what or not array.any()
                    array[:] = turn % 251
                    kept[key] = [array, turn % 251]
                elif what == 2:
                    del kept[key]
                else:
                    array, value = kept[key]
                    old = len(array)
                    array.resize(size, refcheck=False)
                    assert (array[:old] == value).all() and not array[old:].any()
                    array[:] = value
            assert {handler(a) for a, _ in kept.values()} == {"samepage"}
            assert all((a == value).all() for a, value in kept.values())
            early[0].resize(3 << 20, refcheck=False)
            early[2].resize(100, refcheck=False)
            assert [int(a[0]) for a in early] == [10, 5000 % 251, (3 << 20) % 251]
            del early
            last = np.ones(4 << 20)  # is freed when Python is nearly gone
            """,
            path,
        )
    )


def test_a_forked_child_goes_on_being_merged(start: Start, scanner: Scanner, path: str) -> None:
    program = """
        samepage.attach(sys.argv[1])
        before = np.ones(1 << 20)
        children = []
        for _ in range(2):
            pid = os.fork()
            if not pid:
                status = 1
                try:
                    array = table()
                    assert handler(array) == "samepage"
                    assert merged(7 << 20)
                    assert (array == table()).all() and (before == 1).all()
                    open(sys.argv[2] + str(os.getpid()), "w")
                    while len([f for f in os.listdir(os.path.dirname(sys.argv[2])) if f.startswith("done")]) < 2:
                        time.sleep(0.01)
                    status = 0
                finally:
                    os._exit(status)
            children.append(pid)
        assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
    """
    folder = Path(path).parent / "ends"
    folder.mkdir()
    ended(start(program, path, str(folder / "done")))


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_are_executed_are_merged_as_under_samepage_run(
    start: Start, scanner: Scanner, path: str, method: str
) -> None:
    program = """
        from samepage import agent

        def work(_):
            mine = bytearray(table().tobytes())  # not numpy's memory
            return agent.preloaded(), merged(7 << 20), mine == table().tobytes()

        if __name__ == "__main__":
            samepage.attach(sys.argv[1])
            assert not agent.preloaded()
            with multiprocessing.get_context(sys.argv[2]).Pool(2) as pool:
                print(pool.map(work, range(2), chunksize=1))
    """
    assert ended(start(program, path, method)) == "[(True, True, True), (True, True, True)]\n"


def test_a_program_that_executes_itself_again_is_preloaded(start: Start, scanner: Scanner, path: str) -> None:
    program = """
        from samepage import agent

        samepage.attach(sys.argv[1])
        if not agent.preloaded():
            os.execv(sys.executable, sys.orig_argv)
        print(handler(table()), os.environ["LD_PRELOAD"] == str(agent.library_path()))
    """
    assert ended(start(program, path)) == "default_allocator True\n"


def test_where_nobody_listens_nothing_is_changed(start: Start, tmp_path: Path) -> None:
    program = """
        from samepage.service import sockets
        sockets.DAEMON_PATH = "/no/such/socket"
        before = dict(os.environ)
        try:
            samepage.attach()
        except OSError as e:
            print(e.errno == errno.ENOENT, "samepage daemon" in str(e))
        print(os.environ == before, handler(table()))
    """
    assert ended(start(program)) == "True True\nTrue default_allocator\n"


def test_a_process_that_merges_its_own_memory_cannot_attach(start: Start, scanner: Scanner, path: str) -> None:
    program = """
        from samepage.service import sockets
        sockets.DAEMON_PATH = "/no/such/socket"
        region = samepage.register(bytearray(1 << 20))
        try:
            samepage.attach(sys.argv[1])
        except OSError as e:
            print(e.errno == errno.EBUSY, handler(table()), "LD_PRELOAD" in os.environ)
    """
    assert ended(start(program, path)) == "True default_allocator False\n"


def test_a_service_that_comes_later_is_joined_then(start: Start, path: str) -> None:
    program = """
        samepage.attach(sys.argv[1])
        array = table()
        print("attached", flush=True)
        assert merged(7 << 20)
        assert (array == table()).all()
        print("merged", flush=True)
        sys.stdin.read()
    """
    both = [start(program, path) for _ in range(2)]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "attached\n", process.communicate()
    time.sleep(0.2)
    with serving(path):
        for process in both:
            assert process.stdout is not None
            assert process.stdout.readline() == "merged\n", process.communicate()
        for process in both:
            ended(process)


HEAR = """
#include <stddef.h>
static struct { char *start; size_t length; } heard[4096];
static int nr;
void hear(int type, void *event, void *nothing)
{
    if (nr < 4096)
        heard[nr++] = *(__typeof__(heard[0]) *)event;
}
int was_heard(char *p)
{
    for (int i = 0; i < nr; i++)
        if (p >= heard[i].start && p < heard[i].start + heard[i].length)
            return 1;
    return 0;
}
"""


def test_ucx_hears_when_arrays_are_unmapped(start: Start, scanner: Scanner, path: str, tmp_path: Path) -> None:
    program = """
        import ctypes

        hear = ctypes.CDLL(sys.argv[2])
        samepage.attach(sys.argv[1])
        early = table()
        assert merged(7 << 20)
        ctypes.CDLL("libucs.so.0", mode=ctypes.RTLD_GLOBAL)
        assert not ctypes.CDLL("libucm.so.0").ucm_set_event_handler(1 << 17, 1000, hear.hear, None)
        assert (early == table()).all()
        late = np.ones(8 << 20)
        addresses = [early.ctypes.data, late.ctypes.data]
        del early, late
        print([hear.was_heard(ctypes.c_void_p(address)) for address in addresses], in_files())
    """
    if not ctypes.util.find_library("ucm"):
        pytest.skip("needs libucx0")
    source, library = tmp_path / "hear.c", tmp_path / "hear.so"
    source.write_text(HEAR)
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    other = start("samepage.attach(sys.argv[1]); keep = table(); sys.stdin.read()", path)
    process = start(program, path, str(library))
    out, errors = process.communicate(timeout=100)
    assert (process.returncode, out) == (0, "[1, 1] 0\n"), errors
    assert errors == "samepage: python watches its memory (MPI), and is left alone\n"
    ended(other)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_who_becomes_another_user_keeps_its_bytes_and_is_merged_no_more(
    start: Start, scanner: Scanner, path: str
) -> None:
    program = """
        samepage.attach(sys.argv[1])
        array, early = table(), table().tolist()
        assert merged(7 << 20)
        os.setuid(65534)
        array[::7] += 1
        later = table()
        ends = time.monotonic() + 20
        while (agents := [t for t in os.listdir("/proc/self/task")
               if "samepage" in open(f"/proc/self/task/{t}/comm").read()]) and time.monotonic() < ends:
            time.sleep(0.1)
        assert (array[::7] == later[::7] + 1).all() and array[1::7].tolist() == early[1::7]
        print(in_files() < 9 << 20, agents)
    """
    other = start("samepage.attach(sys.argv[1]); keep = table(); sys.stdin.read()", path)
    assert ended(start(program, path)) == "True []\n"
    ended(other)
