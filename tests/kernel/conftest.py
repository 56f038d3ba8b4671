"""Programs that the agent cannot be in, and the kernel's ksmd."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks import kernel_ksm
from tests.agent.preload import compile_c

needs_ksm = pytest.mark.skipif(not kernel_ksm.available(), reason="needs root and the kernel's KSM")


class Holder:
    """A statically linked process with memory like every other's."""

    def __init__(self, program: Path, mib: int) -> None:
        self.pages = mib * 256
        self.process = subprocess.Popen(
            [str(program), str(mib)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self.process.pid
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, what: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def intact(self) -> bool:
        return self.ask("check") == "0\n"

    def merged(self) -> int:
        return kernel_ksm.merging_pages(self.pid)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="session")
def holder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_c(Path(__file__).with_name("holder.c"), tmp_path_factory.mktemp("kernel") / "holder", "-static")


StartHolder = Callable[..., Holder]


@pytest.fixture
def start(holder: Path) -> Iterator[StartHolder]:
    holders: list[Holder] = []

    def start(mib: int = 16) -> Holder:
        holders.append(Holder(holder, mib))
        return holders[-1]

    yield start
    for process in holders:
        process.end()


def samepage(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SAMEPAGE_")}
    return subprocess.run(
        [sys.executable, "-m", "samepage", *arguments], env=environment, capture_output=True, text=True, timeout=100
    )


def mergeable(pid: int) -> bool:
    """Whether what it maps is mergeable by itself."""
    return "ksm_merge_any: yes" in Path(f"/proc/{pid}/ksm_stat").read_text()


def mergeable_mappings(pid: int) -> int:
    flags = [line for line in Path(f"/proc/{pid}/smaps").read_text().splitlines() if line.startswith("VmFlags:")]
    return sum("mg" in line.split() for line in flags)
