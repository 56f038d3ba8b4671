"""Real processes that fill memory which nobody named (`--memory mapped`): when they are looked at."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from samepage import agent
from samepage.memory import PAGE_SIZE
from samepage.service.scanner import Scanner
from tests.agent.preload import compile_c
from tests.service.serving import serving

HERE = Path(__file__).parent
MIB = 1 << 20
MORE = 8 * MIB // PAGE_SIZE
"""Pages that `malloc` and `advise` make."""

pytestmark = pytest.mark.skipif(
    not agent.library_path().exists(), reason=f"needs the agent, and there is no {agent.library_path()}"
)


class Pair:
    """Two processes that do the same, and the service that they join."""

    def __init__(self, program: Path, keep: int, scanner: Scanner, socket: Path, **more: str) -> None:
        self._scanner = scanner
        preload = {"LD_PRELOAD": str(agent.library_path()), "SAMEPAGE_SOCKET": str(socket), "SAMEPAGE_MEMORY": "mapped"}
        self._processes = [
            subprocess.Popen(
                [program, str(keep)], env=preload | more, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for _ in range(2)
        ]

    def tell(self, *words: str) -> None:
        for word in words:
            for process in self._processes:
                assert process.stdin is not None
                process.stdin.write(f"{word}\n")
                process.stdin.flush()
            for process in self._processes:
                assert process.stdout is not None
                assert process.stdout.readline() == "done\n"

    def saved(self) -> int:
        """Pages."""
        return int(self._scanner.counters()["pages_sharing"])

    def await_saved(self, pages: int, seconds: float) -> float:
        """Wait until nearly so many pages are saved; returns how many seconds that took."""
        began = time.monotonic()
        while self.saved() < 0.95 * pages:
            assert time.monotonic() < began + seconds, f"{self.saved()} of {pages} pages after {seconds} s"
            time.sleep(0.02)
        return time.monotonic() - began

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_c(HERE / "motion.c", tmp_path_factory.mktemp("motion") / "motion", "-pthread")


@pytest.fixture
def pair(program: Path, tmp_path: Path) -> Iterator[Callable[..., Pair]]:
    """Start two processes; each keeps so many MiB."""
    pairs = []
    with serving(str(tmp_path / "socket")) as scanner:

        def start(keep: int, **more: str) -> Pair:
            pairs.append(Pair(program, keep, scanner, tmp_path / "socket", **more))
            return pairs[-1]

        yield start
        for one in pairs:
            one.end()


def test_a_process_that_fills_memory_is_merged_when_it_rests_and_not_before(pair: Callable[..., Pair]) -> None:
    two = pair(128)
    two.tell("work", "keep")
    time.sleep(1.5)
    assert two.saved() < MORE  # but for pages of zeros
    two.tell("rest")
    two.await_saved(128 * MIB // PAGE_SIZE, 5)


@pytest.mark.parametrize(("how", "more"), [("malloc", {}), ("malloc", {"SAMEPAGE_MIN_ALLOC": "65536"}), ("advise", {})])
def test_what_a_process_named_is_merged_at_once_while_it_fills_other_memory(
    pair: Callable[..., Pair], how: str, more: dict[str, str]
) -> None:
    two = pair(128, **more)
    two.tell("work", "keep", how)
    assert two.await_saved(MORE, 5) < 3
    assert two.saved() < 2 * MORE  # of the rest, nothing


@pytest.mark.parametrize("how", [[], ["huge"]])  # that takes a CPU, but few page faults
def test_a_process_that_never_rests_is_merged_all_the_same(pair: Callable[..., Pair], how: list[str]) -> None:
    two = pair(32)
    two.tell(*how, "work", "keep")
    two.await_saved(32 * MIB // PAGE_SIZE, 40)
