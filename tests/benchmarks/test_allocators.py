"""`benchmarks.allocators`: the table says what each way to allocate takes, in time and in memory."""

from __future__ import annotations

import sys

import pytest

from benchmarks import allocators
from samepage import agent


@pytest.mark.skipif(
    not agent.library_path().exists(), reason=f"needs the agent, and there is no {agent.library_path()}"
)
def test_time_and_memory_of_each_step_are_told_for_each_allocator(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(allocators, "SECONDS", 0.05)
    monkeypatch.setattr(sys, "argv", ["allocators", "--rounds", "1", "--only", "glibc"])
    allocators.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[2:]] == ["glibc", "glibc, `large`", "glibc, `mapped`", "glibc, `all`"]
    for row in rows[2:]:
        cells = dict(zip(rows[0][1:], row[1:], strict=True))
        nanoseconds, mebibytes = (float(number.replace(",", "")) for number in cells["growing"].split("; "))
        assert nanoseconds > 1_000_000  # 32 MiB are written
        assert mebibytes > 30  # how much more depends on where mremap finds room
        assert float(cells["freed"].split("; ")[1]) < 10  # also with pins in the heap (agent/hooks/heap.c)
