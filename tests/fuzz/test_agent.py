"""Whatever a service asks an agent, the process keeps every byte, answers, and goes on. `make fuzz` goes on from new
seeds.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.fuzz import agent, model


def test_whatever_a_service_asks_not_a_byte_changes_and_nothing_ends_or_hangs(tmp_path: Path) -> None:
    tally: Counter[str] = Counter()
    program, library = model.build(tmp_path)
    for seed in range(20, 26):
        assert agent.run_case(program, library, tmp_path, seed=seed, seconds=8, tally=tally) == ""
        if tally["requests"] > 30 and tally["merged"]:  # on a busy machine that may take longer
            break
    assert tally["requests"] > 30, "hardly anything was asked, so nothing was tested"
    assert tally["merged"], "nothing was merged, so nothing was tested"
