"""The agent as a program finds it: one build, and one service that merges every page, for all tests here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent.preload import Preload, build_agent, start_merge_all


@pytest.fixture(scope="session")
def preload(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Preload]:
    directory: Path = tmp_path_factory.mktemp("agent")
    socket = directory / "socket"
    service = start_merge_all(socket)
    yield Preload(build_agent(directory), str(socket))
    service.kill()
    service.wait()
