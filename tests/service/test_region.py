"""The Python API with the real agent. Every test is a program of its own, for an agent stays as long as its process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from samepage import agent

pytestmark = pytest.mark.skipif(
    not agent.library_path().exists(), reason=f"needs the agent, and there is no {agent.library_path()}"
)

Python = Callable[..., str]

PRELUDE = """
import array, errno, mmap, os, signal, sys, time
import numpy as np
import samepage

PAGE = mmap.PAGESIZE

def twins(npages):
    "Pages in pairs of equal content, in one array that starts at a page."
    memory = mmap.mmap(-1, 2 * npages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    both = np.frombuffer(memory, np.uint8)
    both[:npages * PAGE] = np.frombuffer(np.random.default_rng(1).bytes(npages * PAGE), np.uint8)
    both[npages * PAGE:] = both[:npages * PAGE]
    return both

def raises(kind, code, work):
    try:
        work()
    except kind as e:
        assert code is None or e.errno == code, e
        return e
    raise AssertionError(f"no {kind}")
"""


@pytest.fixture
def python(tmp_path: Path) -> Python:
    """Runs a program after `PRELUDE` and returns what it printed."""

    def python(program: str, *command: str, **variables: str) -> str:
        environment = {k: v for k, v in os.environ.items() if k not in ("SAMEPAGE_SOCKET", "LD_PRELOAD")}
        environment |= {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "XDG_RUNTIME_DIR": str(tmp_path)}
        file = tmp_path / "program.py"
        file.write_text(PRELUDE + textwrap.dedent(program))
        done = subprocess.run(
            [*command, sys.executable, file], capture_output=True, text=True, timeout=60, env=environment | variables
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return python


RUN = (sys.executable, "-m", "samepage", "run")


@pytest.mark.parametrize("command", [(), RUN], ids=["inside the process", "under samepage run"])
def test_merging_and_unmerging_keep_every_byte(python: Python, command: tuple[str, ...]) -> None:
    program = """
        both = twins(600)
        before = both.copy()
        region = samepage.register(both)
        assert (region.nbytes, region.address, region.registered) == (both.nbytes, both.ctypes.data, True)
        assert region.merge() == 1200
        assert samepage.stats()["pages_sharing"] >= 600
        assert (both == before).all()
        both[5] ^= 1
        before[5] ^= 1
        assert (both == before).all()
        region.unmerge()
        assert not region.registered
        assert (both == before).all()
        region.close()
        print(region)
    """
    assert "closed" in python(program, *command)


def test_anything_with_a_writable_contiguous_buffer_can_be_registered(python: Python) -> None:
    python("""
        n = 8 * PAGE
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        for buffer in (bytearray(n), memoryview(bytearray(n)), array.array("d", bytes(n)), mmap.mmap(-1, n, private),
                       np.zeros(n, np.uint8), np.zeros((64, n // 64), order="F")):
            with samepage.register(buffer) as region:
                assert 7 * PAGE <= region.nbytes <= memoryview(buffer).nbytes
                assert region.address % PAGE == 0
    """)


def test_what_cannot_be_registered_is_refused_with_the_true_error(python: Python) -> None:
    python("""
        raises(OSError, errno.EINVAL, lambda: samepage.register(bytearray(10)))
        raises((BufferError, ValueError), None, lambda: samepage.register(bytes(10 * PAGE)))
        raises((BufferError, ValueError), None, lambda: samepage.register(np.zeros(20 * PAGE, np.uint8)[::2]))
        raises(TypeError, None, lambda: samepage.register(42))
        shared = mmap.mmap(-1, 8 * PAGE, mmap.MAP_SHARED)  # others may write there without our knowing
        raises(OSError, errno.EINVAL, lambda: samepage.register(shared))
    """)


def test_a_registered_buffer_stays_where_it_is_until_closed(python: Python) -> None:
    python("""
        buffer = bytearray(8 * PAGE)
        samepage.register(buffer)  # nobody holds the Region: the pin stays all the same
        raises(BufferError, None, lambda: buffer.extend(b"x"))
        other = bytearray(8 * PAGE)
        samepage.register(other).close()
        other.extend(b"x")
    """)


def test_a_closed_region_cannot_be_merged(python: Python) -> None:
    python("""
        region = samepage.register(twins(4))
        region.close()
        region.close()
        raises(ValueError, None, region.merge)
    """)


def test_signal_handlers_run_in_the_middle_of_an_unmerge(python: Python) -> None:
    python("""
        both = twins(8192)
        before = both.copy()
        region = samepage.register(both)
        assert region.merge() == 16384

        seen = []
        class Enough(Exception): pass
        def handler(*_):
            seen.append(region.registered)
            if len(seen) == 3:
                raise Enough
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        try:
            region.unmerge()
            raise SystemExit("the unmerge was over before the third signal came")
        except Enough:
            signal.setitimer(signal.ITIMER_REAL, 0)
        assert region.registered
        assert (both == before).all()
        region.unmerge()
        assert not region.registered
        assert (both == before).all()
    """)


def test_a_forked_child_uses_a_service_of_its_own(python: Python) -> None:
    python("""
        both = twins(100)
        before = both.copy()
        region = samepage.register(both)
        assert region.merge() == 200
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                mine = twins(50)
                own = samepage.register(mine)
                assert own.merge() == 100
                region.unmerge()
                assert (both == before).all()
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert (both == before).all()
        assert samepage.stats()["pages_sharing"] >= 100
    """)


def test_merging_when_the_service_never_comes_is_a_clear_error(python: Python) -> None:
    python(
        """
        from samepage.service import in_use
        in_use.JOIN_TIMEOUT = 0.3
        region = samepage.register(twins(4))
        assert "samepage daemon" in str(raises(OSError, errno.ENOTCONN, region.merge))
        """,
        SAMEPAGE_SOCKET="/no/such/socket",
    )


def test_the_version_is_the_packages() -> None:
    import samepage

    assert set(samepage.__all__) == {"Region", "UnmergeError", "__version__", "attach", "register", "stats"}
    with pytest.raises(AttributeError):
        samepage.nonsense  # noqa: B018
