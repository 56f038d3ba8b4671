"""Programs of others, run with samepage and without."""

from __future__ import annotations

import pytest

from tests.compat.programs import Runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("compat"))
