"""In a cgroup too small for it every unmerge ends in ENOMEM, and nobody is killed: benchmarks/oom.py in short."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import memory_cgroup
from benchmarks.oom import SURFACES, Outcome, under_a_limit
from tests.oom.conftest import needs_agent

pytestmark = [
    needs_agent,
    pytest.mark.skipif(
        os.geteuid() != 0 or memory_cgroup.version() is None,
        reason="needs root and the memory controller, to make memory cgroups",
    ),
]


def refused(surface: str, rounds: int, tmp_path: Path) -> Outcome:
    """As many unmerges as rounds, each of them with ENOMEM."""
    out = under_a_limit(surface, rounds, tmp_path)
    assert (out.rounds, out.enomem, out.other, out.killed) == (rounds, rounds, [], 0)
    assert out.intact
    assert out.finished_when_raised
    return out


@pytest.mark.parametrize("surface", SURFACES)
def test_in_a_full_cgroup_every_unmerge_is_refused_and_nobody_killed(surface: str, tmp_path: Path) -> None:
    assert refused(surface, 8, tmp_path).times_full > 0


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("surface", SURFACES)
def test_two_hundred_times(surface: str, tmp_path: Path) -> None:
    refused(surface, 200, tmp_path)
