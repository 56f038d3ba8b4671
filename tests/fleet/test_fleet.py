"""What `samepage fleet` finds in many hosts' recordings, and where it would put workloads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from samepage.fleet import advice, queries, schema, synthetic
from samepage.fleet.placement import Problem, exact, first_fit, greedy, random
from tests.fleet.test_simulate_command import write_look

HOSTS, HOST_BYTES = 12, 1 << 30


@pytest.fixture(scope="module")
def fleet_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hosts with copies of a recording of five services; kept in full, for it is small."""
    directory = tmp_path_factory.mktemp("fleet")
    template = directory / "template"
    for service in range(5):
        write_look(
            template, 100 + service, {1: [*range(1000 * service + 1, 1000 * service + 401)]}, f"service{service}"
        )
    shape = synthetic.Shape(HOSTS, HOST_BYTES // 64, services_a_host=4)
    synthetic.make(schema.looks([template]), shape, directory / "recording")
    return directory / "recording"


@pytest.fixture(scope="module")
def fleet(fleet_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> queries.Fleet:
    looks = queries.latest(schema.looks([fleet_directory]))
    return queries.Fleet(queries.duckdb(looks, 1 << 30, tmp_path_factory.mktemp("spill")), 1.0)


def test_the_queries_find_what_counting_finds(fleet: queries.Fleet, fleet_directory: Path) -> None:
    by_host: dict[str, Counter[int]] = defaultdict(Counter)
    by_service: dict[str, Counter[int]] = defaultdict(Counter)
    workloads: Counter[tuple[str, str]] = Counter()
    for look in schema.looks([fleet_directory]):
        services = {row["mapping"]: row["service"] for row in pq.read_table(look.mappings).to_pylist()}
        for row in pq.read_table(look.pages).to_pylist():
            by_host[row["host"]][row["hash"]] += row["npages"]
            by_service[services[row["mapping"]]][row["hash"]] += row["npages"]
            workloads[row["host"], services[row["mapping"]]] += row["npages"]
    answers = fleet.ask()
    assert {(a.name, a.pages, a.contents) for a in answers.hosts} == {
        (host, sum(held.values()), len(held)) for host, held in by_host.items()
    }
    assert {(a.name, a.duplicate) for a in answers.services} == {
        (service, sum(held.values()) - len(held)) for service, held in by_service.items()
    }
    everything = sum(by_host.values(), Counter[int]())
    assert (answers.pages, answers.contents) == (sum(everything.values()), len(everything))
    assert answers.between == sum(map(len, by_host.values())) - len(everything)
    first = answers.pairs[0]
    assert first.contents == len(by_service[first.services[0]].keys() & by_service[first.services[1]].keys())
    assert first.contents == max(
        len(by_service[a].keys() & by_service[b].keys()) for a in by_service for b in by_service if a < b
    )
    assert {(w.host, w.service): w.pages for w in answers.workloads} == workloads
    sets = Counter(frozenset(s for s in by_service if h in by_service[s]) for h in everything)
    for group in answers.groups:
        assert sets[frozenset(group.services)] == group.contents


def test_only_the_last_look_of_a_host_counts(tmp_path: Path) -> None:
    for look in (1, 2):
        write_look(tmp_path, look, {1: [look] * 10})
    (last,) = queries.latest(schema.looks([tmp_path]))
    assert last.head.look == 2_000_000


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not shutil.which("java"), reason="needs Java, for Spark")
def test_duckdb_and_spark_give_the_same_answers(
    fleet: queries.Fleet, fleet_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    spark_sql = pytest.importorskip("pyspark.sql")

    session = (
        spark_sql.SparkSession.builder.master("local-cluster[2,1,700]")
        .config("spark.executor.memory", "700m")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.scheduler.minRegisteredResourcesRatio", "1.0")
        .config("spark.sql.shuffle.partitions", "2")
        .config("spark.sql.codegen.wholeStage", "false")  # compiling takes longer than so few rows
        .config("spark.ui.enabled", "false")
        .getOrCreate()
    )
    try:
        looks = queries.latest(schema.looks([fleet_directory]))
        spark = queries.Fleet(queries.spark(looks, session), 1.0)
        assert spark.ask() == fleet.ask()
        assert spark.shared_sets(4) == fleet.shared_sets(4)
        executors = session.sparkContext._jsc.sc().statusTracker().getExecutorInfos()
        assert len(executors) == 3  # and the driver
    finally:
        session.stop()


# -- placement -----------------------------------------------------------------------------------------


def mixed(seed: int, workloads: int, hosts: int, slack: float = 1.3) -> Problem:
    """Workloads of a few services, each with pages of its own, its service's, and everybody's, in no order."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, max(2, workloads // 3), workloads)
    sizes = [int(size) for size in rng.integers(200, 400, workloads)]
    sets: list[tuple[tuple[int, ...], int]] = [(tuple(range(workloads)), 10)]
    for kind in set(kinds.tolist()):
        members = np.flatnonzero(kinds == kind)
        if len(members) > 1:
            sets.append((tuple(members.tolist()), int(rng.integers(50, 150))))
            some = rng.choice(members, max(2, len(members) // 2), False)
            sets.append((tuple(sorted(some.tolist())), int(rng.integers(10, 40))))
    return Problem(sizes, sets, [int(sum(sizes) * slack / hosts)] * hosts, rng.integers(0, hosts, workloads).tolist())


def fits(problem: Problem, host_of: list[int]) -> bool:
    used = np.bincount(host_of, problem.sizes, len(problem.hosts))
    return bool((used <= np.array(problem.hosts)).all())


def test_greedy_saves_nine_tenths_of_what_the_exact_placement_saves() -> None:
    ratios = []
    for seed in range(8):
        problem = mixed(seed, workloads=9, hosts=3)
        best = exact(problem)
        assert best is not None
        near = greedy(problem)
        assert fits(problem, best)
        assert fits(problem, near)
        assert problem.saved(near) <= problem.saved(best) <= problem.bound
        ratios.append(problem.saved(near) / problem.saved(best))
    print([round(ratio, 3) for ratio in ratios])
    assert min(ratios) >= 0.9


def test_on_a_fleet_of_mixed_services_it_saves_twice_what_first_fit_saves(fleet: queries.Fleet) -> None:
    problem = advice.problem_of(fleet, fleet.ask(), int(HOST_BYTES // 64 * 1.5))
    found = {"first-fit": first_fit(problem), "random": random(problem, 0), "greedy": greedy(problem)}
    assert all(fits(problem, host_of) for host_of in found.values())
    saved = {name: problem.saved(host_of) for name, host_of in found.items()}
    print(saved, problem.bound)
    assert 2 * saved["first-fit"] <= saved["greedy"] <= problem.bound
    assert saved["random"] < saved["greedy"]


def test_hosts_of_the_same_size_are_named_so_that_little_is_moved() -> None:
    # They are together already, on what the solver may call other hosts.
    problem = Problem([10, 10, 10, 10], [((0, 1), 5), ((2, 3), 5)], [20, 20], [1, 1, 0, 0])
    best = exact(problem)
    assert best == greedy(problem) == problem.now


# -- the command ---------------------------------------------------------------------------------------


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "samepage", "fleet", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_the_command_tells_all_of_it(fleet_directory: Path) -> None:
    done = run(fleet_directory, "--host-memory", "24M", "--json", "-")
    found: dict[str, Any] = json.loads(done.stdout)
    assert len(found["hosts"]) == HOSTS
    assert found["within"] + found["between"] == found["pages"] - found["contents"]
    plans = {plan["name"].partition(" ")[0]: plan for plan in found["placement"]["plans"]}
    assert plans["as"]["moves"] == 0
    assert plans["samepage"]["saved"] > plans["first-fit"]["saved"]
    assert plans["samepage"]["moves"] == len(found["placement"]["moves"])
    assert "no placement saves more than" in run(fleet_directory, "--host-memory", "24M").stdout


def test_what_cannot_be_is_one_line(fleet_directory: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((tmp_path,), f"there is no recording in {tmp_path}"),
        ((tmp_path / "x",), f"no such directory: {tmp_path}/x"),
        ((fleet_directory, "--host-memory", "1M"), "there is not room for all workloads on these hosts"),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stderr) == (1, f"samepage: {message}\n")


@pytest.mark.parametrize("command", ["record 1 -o x", "simulate x", "fleet x"])
def test_a_library_that_is_not_installed_is_one_line(command: str, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('duckdb', 'highspy', 'ibis', 'pyarrow'): sys.modules[name] = None\n"
        "from samepage.commands import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = [sys.executable, "-c", code, *command.split()]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith(" is not installed: pip install 'samepage[fleet]'\n")
    assert done.stderr.count("\n") == 1
