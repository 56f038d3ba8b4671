"""An agent in a process that forks all the time, which keeps the lock for long each time."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from tests.agent.asked import Process
from tests.agent.preload import Preload, compile_c

HERE = Path(__file__).parent
MAPPINGS, SECONDS = 3_000, 3.0


def test_an_agent_has_its_turn_between_forks_that_follow_one_another_at_once(preload: Preload, tmp_path: Path) -> None:
    """They share a CPU with others. When the lock is free, the application goes on, and has taken it again before the
    agent has a CPU to take it."""
    cpu = ["taskset", "-c", str(min(os.sched_getaffinity(0)))]
    program = compile_c(HERE / "forks.c", tmp_path / "forks")
    process = Process(preload, tmp_path, command=[*cpu, str(program), str(MAPPINGS)])
    others = [subprocess.Popen([*cpu, "sh", "-c", "while :; do :; done"]) for _ in range(3)]
    try:
        print(SECONDS, file=process.process.stdin, flush=True)
        began, asked = time.monotonic(), 0
        while time.monotonic() < began + SECONDS:
            assert len(process.space.areas().ranges)
            asked += 1
        forks, wrong = map(int, process.line().split())
    finally:
        for other in others:
            other.kill()
            other.wait()
        process.end()
    assert wrong == 0
    assert forks
    assert asked >= min(6, forks)  # twice, if the application does not wait
