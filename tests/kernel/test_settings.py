"""/sys/kernel/mm/ksm is put back as it was found, by whoever comes after the last that needed it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from samepage.kernel.pace import QUICK, Machine, Pace, Terms
from samepage.kernel.settings import Settings, start_time


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


class Simulated(Machine):
    """A machine as a test has it."""

    def __init__(self) -> None:
        self.cpu, self.clock, self.free, self.waiting = 0.0, 0.0, 50.0, 0.0

    def cpu_seconds(self) -> float | None:
        return self.cpu

    def available(self) -> float:
        return self.free

    def pressure(self) -> float:
        return self.waiting

    def now(self) -> float:
        return self.clock


@pytest.fixture
def paced(
    settings: Settings, knobs: Path, processes: list[subprocess.Popen[bytes]]
) -> Callable[..., tuple[Pace, Simulated, list[str]]]:
    for name, value in {"advisor_mode": "[none] scan-time", "sleep_millisecs": "20", "general_profit": "0"}.items():
        (knobs / name).write_text(value)
    (knobs / "full_scans").write_text("0")

    def paced(**terms: Any) -> tuple[Pace, Simulated, list[str]]:
        asked, machine, told = Terms(**terms), Simulated(), list[str]()
        settings.hold([processes[0].pid], asked.at_once)
        return Pace(settings, asked, machine, told.append), machine, told

    return paced


Paced = Callable[..., tuple[Pace, Simulated, list[str]]]


def test_idle_passes_stay_within_the_budget_and_are_never_faster_than_they_were(paced: Paced, knobs: Path) -> None:
    pace, machine, _ = paced(cpu=5.0)
    batch = 10.0  # milliseconds of CPU time, then a sleep

    def share() -> float:
        return batch / (batch + int(read(knobs, "sleep_millisecs")))

    for _ in range(200):
        pace.look(0)
        machine.clock += 1.0
        machine.cpu += share()
    assert 0.02 < share() <= 0.05
    batch = 0.05
    for _ in range(200):
        pace.look(0)
        machine.clock += 1.0
        machine.cpu += share()
    assert read(knobs, "sleep_millisecs") == "20"


def test_when_memory_is_short_it_starts_and_when_there_was_enough_for_a_while_it_stops(
    paced: Paced, knobs: Path
) -> None:
    pace, machine, _ = paced(when_short=20.0)

    def runs(free: float, waiting: float = 0.0, seconds: float = 1.0) -> bool:
        machine.free, machine.waiting = free, waiting
        pace.look(0)
        machine.clock += seconds
        pace.look(0)
        return read(knobs, "run") == "1"

    assert not runs(50)
    assert runs(19)
    assert runs(22, seconds=1000)  # not enough yet
    assert runs(30, seconds=59)
    assert runs(24)
    assert not runs(30, seconds=60)
    assert runs(90, waiting=11.0)


def test_when_merging_does_not_pay_it_is_told_and_stopped_only_if_asked_to(paced: Paced, knobs: Path) -> None:
    pace, _, told = paced()
    (knobs / "general_profit").write_text("-4096")
    pace.look(0)
    assert not told  # nothing can have been merged yet
    (knobs / "full_scans").write_text("3")
    for _ in range(3):
        pace.look(0)
    assert told == ["merging does not pay: it costs 4096 bytes more than it saves; ksmd goes on"]
    assert read(knobs, "run") == "1"
    pace, _, told = paced(stop_at_loss=True)
    (knobs / "full_scans").write_text("6")
    for _ in range(3):
        pace.look(0)
    assert [line.partition("; ")[2] for line in told] == ["ksmd rests until there is new memory"]
    assert read(knobs, "run") == "0"
    pace.look(100000)  # new memory: it may pay now
    assert read(knobs, "run") == "1"


def test_what_was_stopped_for_want_of_profit_is_put_back_as_it_was_found(
    paced: Paced, settings: Settings, knobs: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    (knobs / "run").write_text("1")
    pace, _, _ = paced(stop_at_loss=True)
    (knobs / "general_profit").write_text("-4096")
    (knobs / "full_scans").write_text("3")
    pace.look(0)
    assert read(knobs, "run") == "0"
    settings.release([processes[0].pid])
    assert read(knobs, "run") == "1"


def test_of_several_one_sets_the_pace_and_the_next_when_that_has_ended(
    settings: Settings, knobs: Path, tmp_path: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    settings.hold([process.pid for process in processes], {"run": "1"})
    state = json.loads((tmp_path / "state.json").read_text())
    leader = [processes[0].pid, start_time(processes[0].pid)]
    (tmp_path / "state.json").write_text(json.dumps(state | {"leader": leader}))
    assert not settings.lead()
    settings.release([])
    assert not settings.lead()
    processes[0].kill()
    processes[0].wait()
    assert settings.lead()
    assert settings.lead()


def test_the_pace_goes_back_to_what_was_there_before_anybody_held_it(
    settings: Settings, knobs: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    (knobs / "sleep_millisecs").write_text("20")
    settings.hold([processes[0].pid], {"run": "1"})
    settings.change(QUICK)  # another one does, and is killed
    assert (settings.found("pages_to_scan", ""), settings.found("sleep_millisecs", "")) == ("100", "20")
    assert settings.found("run", "") == "0"
