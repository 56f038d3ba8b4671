"""`make bench-apps`: the table says what was saved, and of what did not run why."""

from __future__ import annotations

import sys

import pytest

from benchmarks import apps
from benchmarks.applications import Application, python_script
from samepage import agent

EQUAL = """
import mmap
memory = mmap.mmap(-1, 24 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(6144):
    memory[page * 4096 : page * 4096 + 8] = page.to_bytes(8, "little")
turns(lambda: None)
"""


def table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], application: Application) -> list[str]:
    """The application's row, when it is the only one."""
    monkeypatch.setattr(apps, "APPLICATIONS", [application])
    monkeypatch.setattr(sys, "argv", ["apps", "--rounds", "1", "--memory", "large,mapped"])
    apps.main()
    return [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].strip("|").split("|")]


@pytest.mark.skipif(
    not agent.library_path().exists(), reason=f"needs the agent, and there is no {agent.library_path()}"
)
def test_what_three_copies_save_is_told_for_each_kind_of_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, could, large, mapped, _ = table(monkeypatch, capsys, python_script("equal", EQUAL))
    assert name == "equal"
    assert int(could) >= 47
    assert int(large.split()[0]) <= 1
    assert int(mapped.split()[0]) >= 47


def test_an_application_that_is_not_installed_is_said_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    application = Application("none", "true", needs=["sh", "no-such-program"], imports=["no_such_module"])
    row = table(monkeypatch, capsys, application)
    assert row == ["none", "", "", "", "not run: no-such-program, no_such_module is not installed"]


def test_an_application_that_ends_early_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = table(monkeypatch, capsys, Application("early", "exit 3"))
    assert row == ["early", "", "", "", "did not run: a copy ended with 3 before it was ready"]
