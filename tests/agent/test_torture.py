"""A program that writes, reads into, discards, remaps, frees and forks its memory, merged and broken meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from samepage.agent import forbid_huge_pages
from tests.agent.preload import ROOT, Preload, compile_c

WAYS = {
    "move": [],
    "move, beside a network file system": ["UNPINNED"],
    "write-protect": ["SWAP_WP"],
    "move-untracked": ["NO_TRACKING", "NO_MAP_QUERY"],
    "write-protect-untracked": ["SWAP_WP", "NO_TRACKING"],
    "like Linux 6.1": ["LIKE_6_1", "SWAP_WP"],
    "like Linux 5.10": ["LIKE_5_10", "SWAP_WP"],
    "collisions": ["TRUNCATE_HASH"],
    "huge pages": ["HUGE"],
}


def torture(
    preload: Preload, directory: Path, flags: list[str], seconds: int, seed: int, **environment: str
) -> dict[str, int]:
    """Run it against a storm; what the storm did, when not a byte was wrong."""
    program = compile_c(ROOT / "tests" / "agent" / "torture.c", directory / "torture", "-pthread")
    options = ["huge"] * ("HUGE" in flags) + ["unnamed"] * ("SAMEPAGE_MEMORY" in environment)
    command = [str(program), str(seconds), str(directory), str(seed), *options]
    return storm(preload, directory, flags, command, seconds, **environment)


def crowd(preload: Preload, directory: Path, flags: list[str], seconds: int, seed: int) -> dict[str, int]:
    """The same with tens of thousands of areas."""
    program = compile_c(ROOT / "tests" / "agent" / "crowd.c", directory / "crowd", "-pthread")
    # Some 20,000 areas: a storm knows no vm.max_map_count, and what it cuts in pieces must not take the rest of 65,530.
    command = [str(program), str(seconds), "10000", str(seed)]
    return storm(preload, directory, flags, command, seconds, SAMEPAGE_MIN_ALLOC="65536")


def storm(
    preload: Preload, directory: Path, flags: list[str], command: list[str], seconds: int, **environment: str
) -> dict[str, int]:
    """Run a program that tells when a byte is wrong while a storm merges and breaks; what that did."""
    socket = directory / "storm"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *filter(None, sys.path)])} | environment
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "agent" / "storm.py"), str(socket), *flags],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        done = subprocess.run(
            command,
            env=os.environ | {"LD_PRELOAD": str(preload.library), "SAMEPAGE_SOCKET": str(socket)} | environment,
            capture_output=True,
            text=True,
            timeout=seconds + 100,
            preexec_fn=forbid_huge_pages if "SWAP_WP" in flags else None,
        )
        process.send_signal(signal.SIGTERM)
        tally: dict[str, int] = json.loads(process.stdout.read())
    finally:
        process.kill()
        process.wait()
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{tally}"
    print(done.stdout, tally)
    return tally


@pytest.mark.parametrize("way", WAYS)
def test_no_byte_is_wrong_while_memory_is_merged_and_broken_without_end(
    preload: Preload, tmp_path: Path, way: str
) -> None:
    tally = torture(preload, tmp_path, WAYS[way], seconds=8, seed=len(way))
    expected = "joined as WP" if "SWAP_WP" in WAYS[way] else "joined as MOVE"
    if expected not in tally:
        pytest.skip(f"this kernel or user offers no such swap: {sorted(k for k in tally if k.startswith('joined'))}")
    kind = "huge" if way == "huge pages" else "merge"
    assert tally[f"{kind} DONE"] > 500, "hardly anything was merged, so nothing was tested"
    assert tally[f"{kind} DIFFERENT"] > 50, "no writer was met on the way, so nothing was tested"
    assert tally["break"] > 0
    # Nobody left but those that ended.
    assert not [k for k in tally if k.startswith("left") and ("nonsense" in k or "time" in k)], tally


@pytest.mark.parametrize(("memory", "way"), [("mapped", "move"), ("all", "move"), ("all", "write-protect")])
def test_nor_is_one_where_what_nobody_named_is_merged_too(
    preload: Preload, tmp_path: Path, memory: str, way: str
) -> None:
    tally = torture(preload, tmp_path, WAYS[way], seconds=8, seed=len(memory), SAMEPAGE_MEMORY=memory)
    assert tally["merge DONE"] > 500, "hardly anything was merged, so nothing was tested"
    assert not [k for k in tally if k.startswith("left") and ("nonsense" in k or "time" in k)], tally


@pytest.mark.parametrize("way", ["move", "write-protect"])
def test_no_byte_is_wrong_in_a_crowd_of_tens_of_thousands_of_areas(preload: Preload, tmp_path: Path, way: str) -> None:
    tally = crowd(preload, tmp_path, WAYS[way], seconds=8, seed=len(way))
    assert tally["merge DONE"] > 500, "hardly anything was merged, so nothing was tested"
    assert not [k for k in tally if k.startswith("left") and ("nonsense" in k or "time" in k)], tally


def test_a_crowd_is_served_to_its_end(tmp_path: Path) -> None:
    program = compile_c(ROOT / "tests" / "agent" / "crowd.c", tmp_path / "crowd", "-pthread")
    options = ["--set", "sleep_millisecs=0", "--min-alloc", "64K", "--json", str(tmp_path / "saved.json")]
    command = ["samepage", "run", *options, "--", str(program), "6", "16000", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "not served" not in done.stderr
    assert json.loads((tmp_path / "saved.json").read_text())["bytes_saved_peak"] > 0


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", ["move", "move-untracked"])
def test_nor_is_one_in_a_crowd_after_five_minutes(preload: Preload, tmp_path: Path, way: str) -> None:
    tally = crowd(preload, tmp_path, WAYS[way], seconds=300, seed=2)
    assert tally["merge DONE"] > 10_000


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", ["move", "write-protect", "huge pages"])
def test_nor_is_one_after_ten_minutes(preload: Preload, tmp_path: Path, way: str) -> None:
    tally = torture(preload, tmp_path, WAYS[way], seconds=600, seed=1)
    assert tally["merge DONE"] + tally.get("huge DONE", 0) > 100_000


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", ["move", "write-protect"])
def test_nor_is_one_after_ten_minutes_with_all_memory(preload: Preload, tmp_path: Path, way: str) -> None:
    tally = torture(preload, tmp_path, WAYS[way], seconds=600, seed=1, SAMEPAGE_MEMORY="all")
    assert tally["merge DONE"] > 10_000
