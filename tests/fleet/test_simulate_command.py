"""`samepage simulate` as people call it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from samepage.fleet import schema
from samepage.fleet.replay import mended
from samepage.fleet.space import Content
from samepage.memory import AREA


def simulate(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "samepage", "simulate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def write_look(directory: Path, look: int, processes: dict[int, list[int]], service: str = "s") -> None:
    """Processes with these contents from page 1000 on."""
    head = schema.Head("h", look * 1_000_000, "key", 1.0)
    constant: dict[str, Any] = {"host": "h", "look": head.look}
    mappings, pages = [], []
    for number, (pid, contents) in enumerate(processes.items()):
        about = {"service": service, "image": "i", "comm": "c", "kind": "anonymous", "library": "", "taken": True}
        where = {"vpn": 1000, "end": 1000 + len(contents), "pages": len(contents)}
        host = {"host_bytes": 1 << 30, "fraction": 1.0}
        mappings.append(constant | {"mapping": number, "pid": pid, "domain": 0} | about | where | host)
        for vpn, content in enumerate(contents, 1000):
            page = {"mapping": number, "vpn": vpn, "npages": 1, "hash": content, "frame": True, "forked": False}
            pages.append(constant | page)
    schema.write(
        directory, head, pa.Table.from_pylist(mappings, schema.MAPPINGS), pa.Table.from_pylist(pages, schema.PAGES)
    )


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """Two processes with the same 600 pages; in the second half 100 of one are others."""
    for look in range(6):
        other = [*range(5001, 5101), *range(101, 601)] if look >= 3 else [*range(1, 601)]
        write_look(tmp_path, 100 + 20 * look, {1: [*range(1, 601)], 2: other})
    return tmp_path


def test_every_combination_is_simulated_for_each_engine(recording: Path) -> None:
    found = json.loads(simulate(recording, "--set", "pages_to_scan=1,1000", "--json", "-").stdout)
    assert [(one["engine"], one["knobs"]) for one in found] == [
        (engine, knobs)
        for engine in ("samepage", "kernel")
        for knobs in ({}, {"pages_to_scan": "1"}, {"pages_to_scan": "1000"})
    ]
    by_default = found[0]["moments"]
    assert [m["pages_sharing"] for m in by_default] == [600] * 3 + [500] * 3
    assert found[0]["pages_broken"] == 100
    # At a page in 20 milliseconds two looks at 1200 pages take 48 seconds.
    assert found[4]["bytes_saved_mean"] < found[5]["bytes_saved_mean"]


def test_the_table_and_the_plot(recording: Path, tmp_path: Path) -> None:
    done = simulate(recording, "--engine", "samepage", "--set", "max_page_sharing=2", "--plot", tmp_path / "p.svg")
    assert (done.returncode, done.stderr) == (0, "")
    assert "samepage max_page_sharing=2" in done.stdout
    assert (tmp_path / "p.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "pages_to_scam=1"], "'pages_to_scam=1' is not KNOB=VALUE[,VALUE...]; knobs are "),
        (["--set", "smart_scan=7"], "Invalid argument: smart_scan: 7 is not in 0..1"),
        (["--host", "x"], "there is no recording of x"),
        (["--plot", "p.txt"], "cannot make p.txt: "),
    ],
)
def test_wrong_usage_is_one_line(recording: Path, arguments: list[str], message: str) -> None:
    done = simulate(recording, *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(f"samepage: {message}")
    assert done.stderr.count("\n") == 1


def test_pages_missing_in_one_look_alone_were_being_swapped() -> None:
    areas = np.array([(0, 10)], AREA)

    def content(*pages: tuple[int, int]) -> Content:
        vpn, what = np.array(pages).T
        return Content(vpn, what.astype(np.uint64), np.zeros(len(vpn), np.bool_), areas)

    now = mended(content((1, 7), (2, 8), (3, 9)), content((1, 7)), content((1, 7), (2, 8), (3, 1)))
    assert now.vpn.tolist() == [1, 2]
    assert now.content.tolist() == [7, 8]
