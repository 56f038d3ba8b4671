"""What is predicted is what merging then comes to: the kernel's KSM on the same frozen memory, and samepage."""

from __future__ import annotations

import pytest

from benchmarks import kernel_ksm, scan_workload
from benchmarks import scan as benchmark
from samepage import agent


def off_by(figures: dict[str, int]) -> float:
    predicted, reached = figures["predicted"], figures["reached"]
    return abs(predicted - reached) / max(reached, 1)


@pytest.mark.timeout(600)  # somebody else may have KSM borrowed
@pytest.mark.parametrize(
    "knobs", [{}, pytest.param({"use_zero_pages": 1, "max_page_sharing": 16}, marks=pytest.mark.long)]
)
def test_what_ksm_comes_to_is_predicted_within_a_hundredth(knobs: dict[str, int]) -> None:
    if not kernel_ksm.available():
        pytest.skip("needs root and a kernel with KSM")
    try:
        outcome = benchmark.compare_with_ksm(8, **knobs)
    except scan_workload.Missing as e:
        pytest.skip(f"{e} (Debian: sqlite3, git, gcc)")
    assert outcome["pages_shared"]["reached"] > 2000
    assert {name: figures for name, figures in outcome.items() if off_by(figures) > 0.01} == {}


@pytest.mark.long
@pytest.mark.timeout(900)
def test_what_samepage_saves_is_predicted_within_three_hundredths() -> None:
    if not agent.library_path().exists():
        pytest.skip(f"needs the agent, and there is no {agent.library_path()}")
    try:
        outcome = benchmark.compare_with_samepage(64)
    except scan_workload.Missing as e:
        pytest.skip(f"{e} (Debian: sqlite3, git, gcc)")
    assert {name: figures for name, figures in outcome.items() if off_by(figures) > 0.03} == {}
