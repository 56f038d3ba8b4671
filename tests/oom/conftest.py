"""Real processes in real memory cgroups."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks import memory_cgroup
from benchmarks.memory_cgroup import MemoryCgroup
from benchmarks.oom import Worker
from benchmarks.processes import service
from samepage import agent

MIB = 1 << 20

needs_agent = pytest.mark.skipif(
    not agent.library_path().exists(), reason=f"needs the agent, and there is no {agent.library_path()}"
)


@pytest.fixture
def group() -> Iterator[MemoryCgroup]:
    """A memory cgroup without a limit, so far."""
    if os.geteuid() != 0 or memory_cgroup.version() is None:
        pytest.skip("needs root and the memory controller, to make memory cgroups")
    with MemoryCgroup("test") as made:
        yield made


@pytest.fixture
def socket(tmp_path: Path) -> Iterator[str]:
    """Where a `samepage daemon` listens."""
    with service(tmp_path) as path:
        yield path


Start = Callable[..., Worker]


@pytest.fixture
def start(group: MemoryCgroup, socket: str) -> Iterator[Start]:
    """start(mib, part): a worker in the cgroup, whose memory is not registered yet."""
    workers: list[Worker] = []

    def start(mib: int, part: int, within: bool = True) -> Worker:
        workers.append(Worker(group if within else None, socket, mib, part))
        return workers[-1]

    yield start
    for worker in workers:
        worker.end()
