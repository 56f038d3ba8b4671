"""`benchmarks.overhead`: the table says what jobs pay, and what did not run why."""

from __future__ import annotations

import sys

import pytest

from benchmarks import overhead
from benchmarks.applications import Application
from samepage import agent


def table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], job: Application) -> list[str]:
    """The job's row, when it is the only one."""
    monkeypatch.setattr(overhead, "JOBS", [job])
    monkeypatch.setattr(sys, "argv", ["overhead", "--rounds", "2", "--memory", "mapped"])
    overhead.main()
    return [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].strip("|").split("|")]


@pytest.mark.skipif(
    not agent.library_path().exists(), reason=f"needs the agent, and there is no {agent.library_path()}"
)
def test_time_and_cpu_of_a_job_are_told_against_those_of_the_bare_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Under samepage, and only there, it works for as long again.
    work = "import time; end = time.process_time() + 0.2\nwhile time.process_time() < end: pass"
    script = f"work() {{ $PYTHON -c '{work}'; }}; work; test -z \"$LD_PRELOAD\" || work"
    name, bare, seconds, cpu = table(monkeypatch, capsys, Application("twice", script))
    assert name == "twice"
    assert all(0.2 <= float(number) < 5 for number in bare.split(", "))
    assert all(50 < float(more.split("%")[0]) < 200 for more in (seconds, cpu))


def test_a_job_that_is_not_installed_is_said_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = table(monkeypatch, capsys, Application("none", "true", needs=["no-such-program"]))
    assert row == ["none", "not run: no-such-program is not installed", "", ""]
