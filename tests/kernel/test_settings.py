"""/sys/kernel/mm/ksm is put back as it was found, by whoever comes after the last that needed it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from samepage.kernel.pace import QUICK, Pace
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


def test_new_memory_is_scanned_quickly_and_then_as_it_was_before(
    settings: Settings, knobs: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    (knobs / "advisor_mode").write_text("[none] scan-time")
    (knobs / "sleep_millisecs").write_text("20")

    def pace_at(scans: int, pages: int) -> tuple[str, str]:
        (knobs / "full_scans").write_text(str(scans))
        pace.look(pages)
        return read(knobs, "pages_to_scan"), read(knobs, "sleep_millisecs")

    settings.hold([processes[0].pid], {"run": "1"})
    pace = Pace(settings)
    quick, idle = (QUICK["pages_to_scan"], QUICK["sleep_millisecs"]), ("100", "20")
    assert pace_at(5, 100) == idle  # too little
    assert pace_at(5, 100000) == quick
    assert pace_at(7, 100000) == quick
    assert pace_at(8, 100000) == idle
    assert pace_at(9, 104000) == idle
    assert pace_at(9, 110000) == quick
    assert pace_at(12, 0) == idle
    assert pace_at(12, 50000) == quick
    settings.release([processes[0].pid])
    assert (read(knobs, "run"), read(knobs, "pages_to_scan"), read(knobs, "sleep_millisecs")) == ("0", "100", "20")


def test_the_pace_that_somebody_else_sets_is_left_to_them(
    settings: Settings, knobs: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    (knobs / "advisor_mode").write_text("[none] scan-time")
    (knobs / "sleep_millisecs").write_text("20")
    (knobs / "full_scans").write_text("0")
    settings.hold([processes[0].pid], {"run": "1"})
    pace = Pace(settings)
    pace.look(100000)
    (knobs / "pages_to_scan").write_text("777")
    (knobs / "full_scans").write_text("9")
    pace.look(100000)
    pace.look(900000)
    assert read(knobs, "pages_to_scan") == "777"
    settings.release([processes[0].pid])
    assert read(knobs, "pages_to_scan") == "777"


def test_where_the_kernels_advisor_sets_the_pace_it_is_left_to_it(
    settings: Settings, knobs: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    (knobs / "full_scans").write_text("0")
    (knobs / "sleep_millisecs").write_text("20")
    settings.hold([processes[0].pid], {"run": "1"})
    Pace(settings).look(100000)
    assert read(knobs, "pages_to_scan") == "100"


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
