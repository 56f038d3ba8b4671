"""The main job on Debian's own kernel, in a virtual machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.__main__ import check, newest
from tests.kernels.boot import available


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_on_debians_kernel_all_is_well_or_left_alone(tmp_path: Path) -> None:
    if missing := available():
        pytest.skip(f"{missing} is missing")
    if not newest():
        pytest.skip("no kernel package to be had here")
    for said in check(newest()[0], tmp_path).values():
        assert all(outcome.startswith(("ok", "left alone")) for outcome in said.values()), said
