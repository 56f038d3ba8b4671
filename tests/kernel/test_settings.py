"""/sys/kernel/mm/ksm is put back as it was found, by whoever comes after the last that needed it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from samepage.kernel.settings import Settings


@pytest.fixture
def knobs(tmp_path: Path) -> Path:
    folder = tmp_path / "ksm"
    folder.mkdir()
    for name, value in {"run": "0", "pages_to_scan": "100", "advisor_mode": "none [scan-time]"}.items():
        (folder / name).write_text(f"{value}\n")
    return folder


@pytest.fixture
def settings(knobs: Path, tmp_path: Path) -> Settings:
    return Settings(knobs, tmp_path / "state.json")


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    made = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    yield made
    for process in made:
        process.kill()
        process.wait()


def read(knobs: Path, name: str) -> str:
    return (knobs / name).read_text().strip()


def test_what_was_found_is_put_back_when_the_last_releases_it(
    settings: Settings, knobs: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    one, two = (process.pid for process in processes)
    settings.hold([one], {"run": "1", "pages_to_scan": "5000"})
    settings.hold([two], {"run": "1"})
    settings.release([one])
    assert (read(knobs, "run"), read(knobs, "pages_to_scan")) == ("1", "5000")
    settings.release([two])
    assert (read(knobs, "run"), read(knobs, "pages_to_scan")) == ("0", "100")


def test_the_next_puts_back_what_one_that_was_killed_left(
    settings: Settings, knobs: Path, tmp_path: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    settings.hold([processes[0].pid], {"run": "1"})
    processes[0].kill()
    processes[0].wait()
    Settings(knobs, tmp_path / "state.json").recover()
    assert read(knobs, "run") == "0"
    assert not (tmp_path / "state.json").exists()


def test_what_somebody_else_set_since_stays(
    settings: Settings, knobs: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    settings.hold([processes[0].pid], {"run": "1", "pages_to_scan": "5000"})
    (knobs / "pages_to_scan").write_text("77")
    settings.release([processes[0].pid])
    assert (read(knobs, "run"), read(knobs, "pages_to_scan")) == ("0", "77")


def test_run_2_is_never_written(settings: Settings, knobs: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    (knobs / "run").write_text("2")
    settings.hold([processes[0].pid], {"run": "1"})
    settings.release([processes[0].pid])
    assert read(knobs, "run") == "0"


def test_a_link_in_place_of_the_state_is_not_followed(
    settings: Settings, knobs: Path, tmp_path: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    other = tmp_path / "other"
    other.write_text("precious")
    (tmp_path / "state.json").symlink_to(other)
    settings.hold([processes[0].pid], {"run": "1"})
    assert other.read_text() == "precious"
    settings.release([processes[0].pid])
    assert read(knobs, "run") == "0"
