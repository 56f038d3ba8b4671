"""Whatever agents answer: some cases of the fuzzer (`tests/fuzz/service.py`), among them those that found something."""

from __future__ import annotations

import os
import threading

import pytest

from tests.fuzz import service

FOUND = (49, 73, 215, 1139, 2619, 2665, 4073, 5256, 100330)


@pytest.mark.parametrize("seed", [*FOUND, *range(2000, 2050)])
def test_whatever_agents_answer_the_books_agree_and_others_are_merged_on(seed: int) -> None:
    service.run_case(seed)


def test_what_a_thread_of_its_own_closes_need_not_be_closed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As wire.recv_memfd() has descriptors closed that nobody wants."""
    end = service.Case.end

    def end_and_close(case: service.Case) -> None:
        end(case)
        threading.Timer(0.2, os.close, (os.dup(0),)).start()

    monkeypatch.setattr(service.Case, "end", end_and_close)
    service.run_case(113)
