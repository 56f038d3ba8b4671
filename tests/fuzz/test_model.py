"""The malloc family and the calls that map memory do what a model says, while memory is merged and broken: what was
found once, and some seconds of each mode. `make fuzz` goes on from new seeds.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fuzz import model
from tests.fuzz.model import MODES, Fuzzer, Round, Tally


@pytest.fixture(scope="module")
def tally() -> Tally:
    return Tally()


@pytest.fixture(scope="module")
def fuzzer(tally: Tally) -> Iterator[Fuzzer]:
    with model.fuzzer(tally) as it:
        yield it


@pytest.mark.parametrize("once", model.corpus(), ids=str)
def test_what_was_found_once_is_not_found_again(fuzzer: Fuzzer, once: Round) -> None:
    assert fuzzer.run(once) == ""


@pytest.mark.parametrize("under", ["storm", "service"])
@pytest.mark.parametrize("mode", MODES)
def test_every_call_does_what_the_model_says(fuzzer: Fuzzer, tally: Tally, mode: str, under: str) -> None:
    before = tally.calls
    assert fuzzer.run(Round(mode, 20, MODES[mode], under)) == ""
    assert tally.calls - before >= MODES[mode], "hardly anything was called, so nothing was tested"
