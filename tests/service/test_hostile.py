"""Hostile users against root's daemon, for a short time: `python -m benchmarks.hostile` is the long one."""

from __future__ import annotations

import os

import pytest

from benchmarks import hostile


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be other users")
def test_what_hostile_users_do_keeps_root_from_nothing() -> None:
    found = hostile.run(15.0, 1)
    assert not found["tracebacks"]
    assert found["attacked"]["most"] < 60.0  # it merged, in every round
    assert found["resident_most"]["attacked"] < found["resident_most"]["undisturbed"] + (256 << 20)
