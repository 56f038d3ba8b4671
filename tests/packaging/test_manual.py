"""Man pages, completions and units: what is made of the help texts, and what systemd thinks of the units."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from samepage.commands import parser

ROOT = Path(__file__).parents[2]


def run(command: Sequence[str | Path], **more: str) -> subprocess.CompletedProcess[str]:
    """`more`: of the environment."""
    return subprocess.run(command, env=os.environ | more, capture_output=True, text=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manual")
    assert run([sys.executable, ROOT / "packaging/manual.py", folder]).returncode == 0
    return folder


def subcommands() -> list[str]:
    (group,) = [action for action in parser()._actions if action.metavar == "COMMAND"]
    return list(group.choices or ())


def test_every_subcommand_has_a_page_with_each_of_its_options(made: Path) -> None:
    pages = {path.stem for path in (made / "man1").iterdir()}
    assert pages == {"samepage", "samepage-policy-check", *(f"samepage-{name}" for name in subcommands())}
    assert "\\-\\-pid" in (made / "man1" / "samepage-policy-check.1").read_text()
    page = (made / "man1" / "samepage-run.1").read_text()
    assert all(name in page for name in ("\\-\\-progress", "\\-\\-reserve", "\\-\\-memory"))


@pytest.mark.skipif(shutil.which("man") is None, reason="needs man-db")
def test_pages_are_roff_without_mistakes(made: Path) -> None:
    for path in sorted((made / "man1").iterdir()):
        done = run(["man", "--warnings", "--local-file", path], MANPAGER="cat", LC_ALL="C.UTF-8")
        assert (done.returncode, done.stderr) == (0, "")
        assert "SYNOPSIS" in done.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [("samepage st", "status"), ("samepage run --pro", "--progress"), ("samepage daemon --met", "--metrics")],
)
def test_bash_completes_commands_and_options(made: Path, words: str, expected: str) -> None:
    script = (
        f"source {made}/samepage.bash; COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); "
        '_shtab_samepage samepage; echo "${COMPREPLY[@]}"'
    )
    done = run(["bash", "-c", script])
    assert expected in done.stdout.split()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_finds_nothing_wrong_with_the_units_and_calls_the_service_safe(tmp_path: Path) -> None:
    for name in ("samepage.socket", "samepage.service"):
        text = (ROOT / "packaging/systemd" / name).read_text()
        (tmp_path / name).write_text(text.replace("/usr/bin/samepage", sys.executable))
    units = [tmp_path / "samepage.socket", tmp_path / "samepage.service"]
    verify: list[str | Path] = ["systemd-analyze", "verify", "--man=no", *units]
    done = run(verify)
    ours = [line for line in done.stderr.splitlines() if "samepage" in line]
    assert (done.returncode, ours) == (0, [])
    security: list[str | Path] = ["systemd-analyze", "security", "--offline=true", "--threshold=30", units[1]]
    done = run(security)
    assert done.returncode == 0, done.stdout
