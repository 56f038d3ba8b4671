"""Whatever agents answer: some cases of the fuzzer (`tests/fuzz/service.py`), among them those that found something."""

from __future__ import annotations

import pytest

from tests.fuzz import service

FOUND = (49, 73, 215, 1139, 2619, 2665, 4073, 5256, 100330)


@pytest.mark.parametrize("seed", [*FOUND, *range(2000, 2050)])
def test_whatever_agents_answer_the_books_agree_and_others_are_merged_on(seed: int) -> None:
    service.run_case(seed)
