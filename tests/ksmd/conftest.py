"""A simulated machine, and a ksmd for which no time passes unless told."""

from __future__ import annotations

import pytest

from samepage.ksmd import Ksmd
from samepage.memory.simulated_memory import SimulatedMachine
from tests.ksmd.simulation import new_ksmd


@pytest.fixture
def machine() -> SimulatedMachine:
    return SimulatedMachine()


@pytest.fixture
def ksmd() -> Ksmd:
    return new_ksmd()
