"""`make bench`: the program runs, at sizes that prove nothing about speed, and counts right what it measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import kernel_ksm
from benchmarks.bench import report
from benchmarks.bench.__main__ import main, run
from benchmarks.bench.measures import MIB, Record
from benchmarks.bench.sizes import Sizes
from samepage import agent

needs_agent = pytest.mark.skipif(
    not agent.library_path().exists(), reason=f"needs the agent, and there is no {agent.library_path()}"
)

TINY = Sizes(
    same=16,
    scattered=4,
    runs=4,
    models=2,
    nothing=8,
    rounds=1,
    nothing_window=0.5,
    window=0.1,
    turns=1,
    unchanged=(8,),
    passes=1,
    throughput=16,
    stall=8,
    merging=0.1,
    served=32,  # redis maps little more, and has no agent before it maps 16 MiB
    mixed=20,
    mixed_seconds=3.0,
    guest=16,
    guest_seconds=3,
    defaults_limit=1.0,
    limit=30.0,
)


@needs_agent
@pytest.mark.timeout(300)  # others may have borrowed the kernel's KSM
def test_it_measures_both_sides_and_the_kernels_switches_are_put_back() -> None:
    before = {p.name: p.read_text() for p in kernel_ksm.KSM.glob("*") if p.stat().st_mode & 0o200}
    names = ["same", "nothing", "mixed", "throughput", "unchanged", "stall", "neighbour", "holes", "guest"]
    records, bench = run(names, TINY, 1, Console(stderr=True))
    if kernel_ksm.available() and not kernel_ksm.in_use():
        assert {p.name: p.read_text() for p in kernel_ksm.KSM.glob("*") if p.stat().st_mode & 0o200} == before
    assert not bench.failed
    assert {record["experiment"] for record in records} == set(names) - set(bench.skipped)
    same = {record["side"]: record for record in records if record["experiment"] == "same"}
    assert {"samepage", "shared_memory", "mapped file"} <= set(same)
    for record in same.values():
        if record["side"] not in ("ksmd defaults", "floor"):
            assert record["saved_pss"] > 0.9 * 16 * MIB
    if kernel_ksm.available():
        assert {"ksmd fastest", "ksmd defaults"} <= set(same)
    else:
        assert "the kernel's KSM" in bench.skipped
    assert "floor" in same or "the floor" in bench.skipped
    for record in records:
        if record["experiment"] == "neighbour" and record["side"] != "alone":
            assert record["saved"] > 0.7 * TINY.served * MIB
    rows = report.rows(records)
    assert all("samepage" in row.values for row in rows)
    assert json.dumps(records)


def curve(side: str, repeat: int, seconds: list[float], saved: list[int], **more: Any) -> Record:
    at = {"seconds": seconds, "saved": saved, "cpu_seconds": [s / 2 for s in seconds]}
    rest: Record = {"goal": 1000, "finished": True, "saved_pss": saved[-1], "counters": {}, "mappings_added": 0}
    rest["metadata"] = {"bytes": 30, "pages": 2}
    return {"experiment": "scattered", "side": side, "repeat": repeat, "curve": at} | rest | more


def test_a_side_is_timed_to_what_both_sides_save() -> None:
    ours = curve("samepage", 0, [0.0, 0.1, 0.2, 0.3], [0, 400, 480, 500])
    theirs = curve("ksmd fastest", 0, [0.0, 1.0, 2.0, 3.0], [0, 470, 480, 1000])
    time = report.rows([ours, theirs])[0]
    assert time.name == "time until 48% of what can be saved is"
    assert time.values == {"samepage": 0.2, "ksmd fastest": 2.0}
    assert time.ratio == pytest.approx(10)
    assert time.reached is True


def test_a_ratio_is_the_median_of_those_of_each_repeat() -> None:
    records = []
    for repeat, (ours, theirs) in enumerate([(1.0, 2.0), (2.0, 2.0), (1.0, 9.0)]):
        records.append(curve("samepage", repeat, [0.0, ours], [0, 1000]))
        records.append(curve("ksmd fastest", repeat, [0.0, theirs], [0, 1000]))
    time = report.rows(records)[0]
    assert time.values == {"samepage": 1.0, "ksmd fastest": 2.0}
    assert time.ratio == 2
    assert time.spread == {"samepage": [1.0, 2.0], "ksmd fastest": [2.0, 9.0]}


def test_who_did_not_finish_is_said_to_have_come_so_far() -> None:
    done = curve("samepage", 0, [0.0, 0.1], [0, 1000])
    slow = curve("ksmd defaults", 0, [0.0, 60.0], [0, 20], finished=False)
    time = report.rows([done, slow])[0]
    assert time.values["ksmd defaults"] == "not finished: 2% after 60 s"


def rates(writes: float | None) -> Record:
    return {"reductions": 2 * writes if writes else None, "writes": writes}


def test_an_application_is_compared_with_itself_before_and_after() -> None:
    done: Record = {"experiment": "nothing", "side": "samepage", "repeat": 0, "cpu_share": 0.01}
    done |= {"before": rates(90.0), "on": rates(99.0), "after": rates(110.0)}
    none_seen = done | {"repeat": 1, "after": rates(None)}
    share, sums, writes = report.rows([done, none_seen])
    assert share.values == {"samepage": 1.0}
    assert sums.values == writes.values == {"samepage": 99.0}


def test_a_machine_that_gives_less_afterwards_gives_the_yardstick_less_too() -> None:
    def turns(*writes: tuple[float | None, float]) -> list[Record]:
        return [{"worker": rates(worker), "yardstick": rates(yardstick)} for worker, yardstick in writes]

    done: Record = {"experiment": "throughput", "side": "samepage", "repeat": 0, "merging": rates(60.0)}
    done |= {"before": turns((100.0, 80.0), (120.0, 96.0), (30.0, 25.0)), "after": turns((50.0, 50.0), (20.0, 20.0))}
    none_seen = done | {"repeat": 1, "merging": rates(None), "after": turns((None, 1.0))}
    sums_meanwhile, writes_meanwhile, sums, writes = report.rows([done, none_seen])
    assert sums_meanwhile.values == writes_meanwhile.values == {"samepage": 60.0}
    assert sums.values == writes.values == {"samepage": 80.0}


def test_of_a_hundred_writes_the_slowest_is_beyond_the_99th_percentile() -> None:
    histogram = [[0, 1, 500], [90, 9, 1]]
    assert report.percentile_us(histogram, 0.5) == 1
    assert report.percentile_us(histogram, 0.99) == 2
    assert report.percentile_us(histogram, 0.999) == 501


def test_answers_are_compared_with_those_of_the_same_server_before() -> None:
    def answers(took_us: int) -> Record:
        return {"longest_us": took_us, "histogram_us": [[took_us - 1], [10]]}

    record: Record = {"experiment": "neighbour", "side": "samepage", "repeat": 0, "kind": "redis", "free_core": False}
    record["saved"] = 64 * MIB
    none_seen = record | {"repeat": 1, "before": answers(50), "merging": {"longest_us": 0, "histogram_us": [[], []]}}
    record |= {"before": answers(40), "merging": answers(50), "merged": answers(60)}
    none_seen |= {"merged": answers(100)}
    rows = {row.name.partition(": ")[2]: row for row in report.rows([record, none_seen])}
    assert rows["99th percentile before"].values == {"samepage": 45.0}
    assert rows["99th percentile while merging, of before"].values == {"samepage": 1.25}
    assert rows["99th percentile while merging, of before"].reached
    assert rows["99th percentile merged, of before"].values == {"samepage": 1.75}
    assert not rows["99th percentile merged, of before"].reached


def test_an_experiment_that_does_not_exist_is_refused_with_those_that_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["sane"])
    assert refused.value.code == 2
    assert "no experiment sane; there are same, eight, model" in capsys.readouterr().err


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'samepage[bench]'")
    from benchmarks.bench.plot import plot

    records = [curve("samepage", 0, [0.0, 0.1], [0, 1000]), curve("ksmd fastest", 0, [0.0, 1.0], [0, 1000])]
    plot(records, report.rows(records), tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text()


def test_of_mixed_memory_what_counts_is_what_was_saved_for_the_cpu_that_was_spent() -> None:
    def record(side: str, saved: list[int], cpu: list[float]) -> Record:
        curve = {"seconds": [0.0, 30.0, 60.0], "saved": [mib * MIB for mib in saved], "cpu_seconds": cpu}
        return {"experiment": "mixed", "side": side, "repeat": 0, "goal": 50 * MIB, **curve}

    records = [
        record("samepage", [0, 50, 50], [0.0, 1.0, 2.0]),
        record("ksmd fastest", [0, 5, 40], [0.0, 2.0, 20.0]),
        record("ksmd fastest, smart_scan 0", [0, 0, 40], [0.0, 20.0, 60.0]),
        record("ksmd defaults", [0, 0, 0], [0.0, 1.0, 2.0]),
    ]
    rows = {row.name: row for row in report.rows(records)}
    each = rows["CPU for each MiB saved, smart_scan 1 for ksmd"]
    assert each.values == {"samepage": 0.04, "ksmd fastest": 0.5}
    assert each.ratio == pytest.approx(12.5)
    assert each.reached
    assert rows["CPU for each MiB saved, smart_scan 0 for ksmd"].values["ksmd fastest"] == 1.5
    same = rows["memory saved for the CPU that samepage takes"]
    assert (same.values["samepage"], same.values["ksmd fastest"], same.values["ksmd defaults"]) == (50, 5, 0)
    assert same.reached
