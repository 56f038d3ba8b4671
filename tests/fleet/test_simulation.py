"""A recording of what ran, simulated with the settings that it ran with, comes to the counters that it had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.processes import service
from samepage.fleet import schema
from samepage.fleet.replay import Engine, Replay, Setting
from tests.fleet.workloads import COUNTERS, WORKLOADS, ZEROS, Run, recorded

TOLERANCE = 0.02


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("workload", "knobs"), WORKLOADS.values(), ids=WORKLOADS.keys())
def test_the_simulation_comes_to_what_was_counted(
    workload: Callable[[Run], None], knobs: dict[str, int | str], tmp_path: Path
) -> None:
    (tmp_path / "service").mkdir()
    with service(tmp_path / "service") as socket, recorded(workload, socket, knobs | ZEROS, tmp_path) as run:
        pass
    looks = schema.looks([tmp_path])
    setting = Setting(Engine.SAMEPAGE, {name: str(value) for name, value in (knobs | ZEROS).items()})
    outcome = Replay(setting, 1.0).run(looks)
    for at, counted in run.counted:
        moment = outcome.moments[[look.head.look for look in looks].index(at)]
        predicted = moment.counters | {"bytes_saved": moment.bytes_saved}
        print({name: (predicted[name], counted[name]) for name in COUNTERS})
        for name in COUNTERS:
            assert abs(predicted[name] - counted[name]) <= TOLERANCE * counted[name], (name, predicted, counted)
    print("CPU seconds", outcome.cpu_seconds, counted["cpu_seconds"])
