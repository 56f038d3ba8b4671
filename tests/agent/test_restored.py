"""A process restored from a checkpoint has one table of descriptors, for the agent's thread too, which leaves them to
the program."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.oom import rows, samepage
from benchmarks.processes import service, wait_until
from samepage.process.halt import agent_thread
from tests.agent.preload import ROOT, Preload, compile_c

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to trace and to restore")


@pytest.fixture(scope="module")
def restored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_c(
        ROOT / "tests" / "agent" / "restored.c", tmp_path_factory.mktemp("restored") / "restored", "-pthread"
    )


class Program:
    """One copy of restored.c, whatever its parent is."""

    def __init__(self, preload: Preload, program: Path, socket: str, file: Path) -> None:
        env = {k: v for k, v in os.environ.items() if not k.startswith("SAMEPAGE_")}
        env |= {"LD_PRELOAD": str(preload.library), "SAMEPAGE_SOCKET": socket}
        self.file = file
        null = subprocess.DEVNULL
        self.process = subprocess.Popen(
            [program, "run", file], env=env, stdin=null, stdout=null, stderr=null, start_new_session=True, cwd="/"
        )
        self.pid = self.process.pid

    def said(self) -> list[int]:
        """How many numbers came, were lost, and how often memory was wrong."""
        with contextlib.suppress(OSError):
            return [int(word) for word in self.file.read_text().split()]
        return []

    def goes_on(self) -> None:
        """Wait until it has looked at everything again."""
        before = (self.said() or [0])[0]
        try:
            wait_until(lambda: len(said := self.said()) == 3 and said[0] > before + 1000, "going on", seconds=30)
        except TimeoutError as e:
            raise TimeoutError(f"{e}: {self.state()}") from None

    def state(self) -> str:
        """Where its threads are."""
        found = [f"{self.pid}, has said {self.said()}"]
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{self.pid}/task").iterdir():
                found += [(task / name).read_text() for name in ("comm", "stat", "wchan", "syscall", "stack")]
        return "\n".join(found)

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.process.wait()


Start = Callable[[], Program]


@pytest.fixture
def start(preload: Preload, restored: Path, tmp_path: Path) -> Iterator[Start]:
    with service(tmp_path) as path:
        samepage(path, "set", "sleep_millisecs", "0")
        programs: list[Program] = []

        def start() -> Program:
            programs.append(Program(preload, restored, path, tmp_path / f"{len(programs)}.txt"))
            return programs[-1]

        start.socket = path  # type: ignore[attr-defined]
        yield start
        for program in programs:
            program.end()


def merged(start: Start, *programs: Program) -> bool:
    found = rows(start.socket)  # type: ignore[attr-defined]
    return all(found.get(program.pid, {}).get("merged", 0) > 4000 for program in programs)


def has_agent(program: Program) -> bool:
    return agent_thread(program.pid) != program.pid


@pytest.mark.parametrize("attempt", range(3))
def test_descriptors_that_are_not_the_agents_any_more_are_left_alone(
    start: Start, restored: Path, attempt: int
) -> None:
    programs = [start() for _ in range(2)]
    wait_until(lambda: merged(start, *programs), "merged")
    tid = agent_thread(programs[0].pid)
    subprocess.run([restored, "rob", str(programs[0].pid), str(tid)], check=True)
    wait_until(lambda: not has_agent(programs[0]), "without an agent", seconds=20)
    for program in programs:
        program.goes_on()
        assert program.said()[1:] == [0, 0]
    assert has_agent(programs[1])


def criu(*arguments: str, folder: Path) -> bool:
    command = ["criu", *arguments, "-D", str(folder), "-o", f"{arguments[0]}.log", "--shell-job"]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0


needs_criu = pytest.mark.skipif(
    not shutil.which("criu") or subprocess.run(["criu", "check"], capture_output=True).returncode != 0,
    reason="needs a criu that works here",
)


@needs_criu
@pytest.mark.parametrize("attempt", range(int(os.environ.get("SAMEPAGE_RESTORES", "3"))))
def test_a_process_restored_by_criu_has_its_memory_and_its_descriptors_to_itself(
    start: Start, tmp_path: Path, attempt: int
) -> None:
    programs = [start() for _ in range(2)]
    if attempt % 2:
        wait_until(lambda: merged(start, *programs), "merged")
    else:  # in the middle of it
        wait_until(lambda: programs[0].pid in rows(start.socket), "joined")  # type: ignore[attr-defined]
        time.sleep(attempt / 100)
    images = tmp_path / "images"
    images.mkdir()
    # Of a process that is making a step of a swap, by a child that shares its memory, there can be no image.
    wait_until(lambda: criu("dump", "-t", str(programs[0].pid), folder=images), "dumped", seconds=20)
    programs[0].process.wait()
    # Its number is free when whoever was in its session is gone, such a child among them.
    wait_until(lambda: criu("restore", "--restore-detached", folder=images), "restored", seconds=20)
    wait_until(lambda: not has_agent(programs[0]), "without an agent", seconds=20)
    for program in programs:
        program.goes_on()
        assert program.said()[1:] == [0, 0]
