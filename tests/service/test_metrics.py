"""Metrics: they add up with `status`, stay few whatever users do, and nobody who asks holds anything up."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from samepage.ksmd import ProcessRow
from samepage.ksmd.counters import DomainRow, Snapshot
from samepage.memory import NO_STALLS, PAGE_SIZE, Stalls
from samepage.memory.agent import memory_cgroup
from samepage.memory.conversation import ENDED
from samepage.process.merge_domain import MergeDomain
from samepage.service import exposition, tally
from samepage.service.exposition import Exposition
from samepage.service.metrics import Metrics, left_alone, shares
from samepage.service.scanner import Scanner
from samepage.service.sockets import ControlError
from samepage.service.tally import PLACES_MAX, PLACES_OF_A_GUEST, Place, Tally
from tests.service import fake_agent
from tests.service.serving import serving

NPAGES = 64

ROW = ProcessRow(
    pid=1,
    comm="x",
    swap="move",
    state="running",
    unmerge_pending=False,
    domain=MergeDomain(0),
    owner=MergeDomain(0),
    ksm_rmap_items=0,
    ksm_merging_pages=0,
    ksm_zero_pages=0,
    merged=0,
    bytes_needed=0,
    pages_inherited=0,
    pages_broken=0,
    pages_deferred=0,
    pages_unmerged_vma=0,
    ksm_merge_any=False,
    ksm_mergeable=True,
    ksm_process_profit=0,
    cpu_seconds=0.0,
)

NODE_EXPORTER = {
    "node_ksmd_full_scans_total": "counter",
    "node_ksmd_general_profit_bytes": "gauge",
    "node_ksmd_merge_across_nodes": "gauge",
    "node_ksmd_pages_shared": "gauge",
    "node_ksmd_pages_sharing": "gauge",
    "node_ksmd_pages_to_scan": "gauge",
    "node_ksmd_pages_unshared": "gauge",
    "node_ksmd_pages_volatile": "gauge",
    "node_ksmd_run": "gauge",
    "node_ksmd_sleep_seconds": "gauge",
}
"""What its ksmd collector exposes (collector/ksmd_linux.go)."""

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def scanner(tmp_path: Path) -> Iterator[Scanner]:
    """That of a service at tmp_path/socket."""
    with serving(str(tmp_path / "socket")) as scanner:
        yield scanner


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts fake agents."""
    started = []

    def start(lie: str = "") -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            fake_agent.__file__,
            str(tmp_path / "socket"),
            "1",
            str(NPAGES),
            *([lie] * bool(lie)),
        ]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def samples(scanner: Scanner) -> Samples:
    text = generate_latest(Metrics(scanner)).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def summed(found: Samples, name: str, **labels: str) -> float:
    return sum(v for (n, of), v in found.items() if n == name and labels.items() <= dict(of).items())


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


def test_the_names_of_node_exporter_are_all_there_with_their_types() -> None:
    text = generate_latest(Metrics(Scanner())).decode()
    lines = text.splitlines()
    types = dict(line.split()[2:] for line in lines if line.startswith("# TYPE node_ksmd_"))
    assert types == NODE_EXPORTER


def test_what_metrics_say_is_what_status_says(scanner: Scanner, start: Callable[..., subprocess.Popen[bytes]]) -> None:
    start(), start()
    until(lambda: scanner.counters()["bytes_saved"] == NPAGES * PAGE_SIZE)
    found, counters, rows = samples(scanner), scanner.counters(), scanner.rows()
    assert summed(found, "samepage_saved_bytes") == counters["bytes_saved"]
    assert summed(found, "samepage_saved_bytes", domain=str(os.getuid())) == counters["bytes_saved"]
    assert summed(found, "samepage_merged_bytes") == sum(row["bytes_needed"] for row in rows)
    assert summed(found, "samepage_processes") == 2
    assert found["node_ksmd_pages_sharing", ()] == counters["pages_sharing"]
    assert found["node_ksmd_general_profit_bytes", ()] == counters["general_profit"]
    assert {dict(of).get("cgroup") for name, of in found if name == "samepage_processes"} == {
        memory_cgroup(os.getpid())
    }


def test_unmerges_are_counted_by_their_outcome(scanner: Scanner, start: Callable[..., subprocess.Popen[bytes]]) -> None:
    honest, poor = start(), start("poor")
    until(lambda: scanner.counters()["bytes_saved"] == NPAGES * PAGE_SIZE)
    scanner.set("run", "0")
    scanner.unmerge([honest.pid], lambda _: None, lambda: False)
    scanner.unmerge([poor.pid], lambda _: None, lambda: False)
    with pytest.raises(OSError, match="unmerged"):
        scanner.set("run", "2")
    found = samples(scanner)
    assert summed(found, "samepage_unmerges_total", outcome="done") >= 1
    assert summed(found, "samepage_unmerges_total", outcome="ENOMEM") == 2


def test_what_can_be_counted_is_there_as_zero_before_it_happens() -> None:
    scanner = Scanner()
    scanner.tally.enter(os.getpid(), MergeDomain(0))
    found = samples(scanner)
    assert {
        dict(of)["outcome"]: v for (name, of), v in found.items() if name == "samepage_unmerges_total"
    } == dict.fromkeys(tally.OUTCOMES, 0)
    assert {dict(of)["why"] for name, of in found if name == "samepage_joins_refused_total"} == set(tally.REFUSALS)


def test_the_board_asks_for_nothing_that_there_is_not(
    scanner: Scanner, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    start()
    until(lambda: len(scanner.rows()) == 1)
    board = (Path(__file__).parents[2] / "examples/grafana/samepage.json").read_text()
    asked = set(re.findall(r"\b(?:node_ksmd|samepage)_\w+", board)) - {"samepage_processes_left_alone"}
    assert asked <= {name for name, _ in samples(scanner)}
    panels = json.loads(board)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_a_process_that_is_cut_off_and_one_that_is_stopped_are_told(
    scanner: Scanner, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    start("garbage")
    until(lambda: summed(samples(scanner), "samepage_processes_dropped_total", why="protocol") == 1)
    assert summed(samples(scanner), "samepage_processes") == 0


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (ROW, ""),
        (replace(ROW, state="frozen", swap="none"), "frozen"),
        (replace(ROW, swap="none"), "no way to swap"),
        (replace(ROW, swap="quiet"), "merged on request only"),
        (replace(ROW, ksm_mergeable=False), "nothing mergeable"),
    ],
)
def test_it_is_told_why_a_process_is_left_alone(row: ProcessRow, why: str) -> None:
    assert left_alone(row) == why


def test_a_domains_saving_is_shared_out_to_the_last_byte() -> None:
    a, b = Place("0", "a"), Place("0", "b")
    rows = tuple(replace(ROW, pid=n, ksm_merging_pages=m, ksm_zero_pages=z) for n, m, z in ((1, 7, 2), (2, 3, 0)))
    for saved in (0, 10 * PAGE_SIZE + 1, -8 * PAGE_SIZE):
        snapshot = Snapshot(domains=(DomainRow(MergeDomain(0), 0, 0, 0, 0, 2, saved, 0),), make_rows=lambda: rows)
        found = shares(snapshot, [a, b])
        assert found[a] + found[b] == saved
    assert shares(snapshot, [a, b]) == {a: (2 - 7) * PAGE_SIZE, b: -3 * PAGE_SIZE}


def test_a_user_who_makes_many_cgroups_or_namespaces_makes_few_series() -> None:
    counted = Tally(0, cgroup_of=lambda pid: f"/user/{pid}")
    for pid in range(1, 5 * PLACES_MAX):
        counted.enter(pid, MergeDomain(1000, pid))
    assert len(counted.places()) == PLACES_OF_A_GUEST + 1
    counted.enter(1, MergeDomain(0))
    assert Place("0", "/user/1").domain in {place.domain for place in counted.places()}
    for pid in range(1, 5 * PLACES_MAX):
        counted.enter(pid, MergeDomain(0))
    assert len(counted.places()) == PLACES_MAX + 1


def test_a_place_that_nobody_is_in_makes_room_after_a_while() -> None:
    clock = Clock()
    counted = Tally(0, clock, lambda pid: f"/{pid}")
    for pid in range(PLACES_MAX):
        counted.enter(pid, MergeDomain(0))
        if pid:
            counted.leave(pid, 0.0, NO_STALLS, None)
    clock.now += tally.IDLE + 1
    counted.enter(1234, MergeDomain(0))
    assert {place.cgroup for place in counted.places()} == {"/0", "/1234"}


def test_cpu_time_is_counted_once_over_an_exec_and_an_end() -> None:
    clock = Clock()
    counted = Tally(0, clock, lambda pid: "/")
    counted.enter(1, MergeDomain(0))
    clock.now += 2
    counted.look([replace(ROW, cpu_seconds=3.0)])
    counted.leave(1, 4.0, NO_STALLS, None)
    counted.enter(1, MergeDomain(0))
    counted.look([replace(ROW, cpu_seconds=4.0)])  # a row of before
    clock.now += 2
    counted.look([replace(ROW, cpu_seconds=0.5)])
    counted.leave(1, 1.0, NO_STALLS, ENDED)
    counted.look([replace(ROW, cpu_seconds=1.0)])
    assert [place.cpu_seconds for place in counted.places()] == [5.0]


def test_how_long_threads_were_held_up_is_a_histogram_that_only_grows() -> None:
    clock, scanner = Clock(), Scanner()
    scanner.tally = Tally(0, clock, lambda pid: "/x")
    first, more = Stalls((2, 0, 0, 0, 1, 0, 0, 0), 1_040_000), Stalls((2, 3, 0, 0, 1, 0, 0, 1), 200_000_000)
    scanner.tally.enter(1, MergeDomain(0))
    found = samples(scanner)
    assert summed(found, "samepage_stall_seconds_bucket") == 0
    assert len([name for name, _ in found if name == "samepage_stall_seconds_bucket"]) == len(first.counts)
    clock.now += 2
    scanner.tally.look([replace(ROW, stalls=first)])
    scanner.tally.look([replace(ROW, stalls=first)])
    scanner.tally.leave(1, 0.0, more, None)
    scanner.tally.enter(1, MergeDomain(0))
    scanner.tally.leave(1, 0.0, first, None)
    found = samples(scanner)
    below = {dict(of)["le"]: n for (name, of), n in found.items() if name == "samepage_stall_seconds_bucket"}
    assert below == {"3e-05": 4, "0.0001": 7, "0.0003": 7, "0.001": 7, "0.003": 9, "0.01": 9, "0.1": 9, "+Inf": 10}
    assert summed(found, "samepage_stall_seconds_count") == 10
    assert summed(found, "samepage_stall_seconds_sum") == pytest.approx(0.20104)


def test_names_of_cgroups_can_be_anything() -> None:
    scanner = Scanner()
    scanner.tally = Tally(0, cgroup_of=lambda pid: '"}\nevil 1\n\\' + "x" * 5000)
    scanner.tally.enter(1, MergeDomain(0))
    text = generate_latest(Metrics(scanner)).decode()
    list(text_string_to_metric_families(text))
    assert "\nevil" not in text
    assert max(map(len, text.splitlines())) < 1000


# -- who connects ---------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The path of a Unix socket where something is exposed."""
    path = str(tmp_path / "metrics")
    server = Exposition(exposition.listen(path), lambda: b"metric 1\n")
    yield path
    server.stop()


def ask(path: str, request: bytes = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n") -> bytes:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(path)
        sock.sendall(request)
        return b"".join(iter(lambda: sock.recv(65536), b""))


def test_metrics_are_served_to_who_asks_as_http_has_it(served: str) -> None:
    answer = ask(served)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"\r\n\r\nmetric 1\n")
    assert ask(served, b"HEAD /metrics HTTP/1.1\r\n\r\n").endswith(b"\r\n\r\n")
    assert b" 404 " in ask(served, b"GET / HTTP/1.1\r\n\r\n")
    assert b" 405 " in ask(served, b"POST /metrics HTTP/1.1\r\n\r\n")
    assert b" 400 " in ask(served, b"nonsense\r\n\r\n")
    with pytest.raises(ConnectionError):
        ask(served, b"x" * 100_000)


def test_connections_that_say_nothing_keep_nobody_waiting(served: str) -> None:
    silent = [socket.socket(socket.AF_UNIX) for _ in range(4 * exposition.OPEN_MAX)]
    before = len(os.listdir("/proc/self/fd"))
    for sock in silent:
        sock.settimeout(10)
        sock.connect(served)
        sock.send(b"GET /metrics")
    began = time.monotonic()
    assert ask(served).endswith(b"metric 1\n")
    assert time.monotonic() - began < 2
    assert len(os.listdir("/proc/self/fd")) - before <= exposition.OPEN_MAX + 2
    for sock in silent:
        sock.close()


def test_a_silent_connection_ends_by_itself(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition, "PATIENCE", 0.2)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(served)
        assert sock.recv(1) == b""


def test_who_asks_without_end_has_little_made_for_it(tmp_path: Path) -> None:
    made: list[bytes] = []

    def render() -> bytes:
        made.append(b"x 1\n")
        return made[-1]

    server = Exposition(exposition.listen(str(tmp_path / "m")), render)
    for _ in range(20):
        ask(str(tmp_path / "m"))
    server.stop()
    assert len(made) == 1


def test_a_mistake_ends_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    server = Exposition(exposition.listen(str(tmp_path / "m")), lambda: b"%d\n" % (1 // 0))
    assert b" 500 " in ask(str(tmp_path / "m"))
    assert b" 500 " in ask(str(tmp_path / "m"))
    server.stop()
    assert "mistake" in capfd.readouterr().err


def test_metrics_do_not_wait_for_ksmd(scanner: Scanner) -> None:
    with scanner._ksmd.mutex, scanner._gate:
        assert generate_latest(Metrics(scanner))


def test_a_socket_for_metrics_is_its_owners_alone(served: str) -> None:
    assert os.stat(served).st_mode & 0o777 == 0o600


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:x", "127.0.0.1:99999", "256.1.1.1:80", "/no/such/place"])
def test_where_it_cannot_listen_one_line_says_so(address: str) -> None:
    with pytest.raises(ControlError, match="cannot listen"):
        exposition.listen(address)


@pytest.mark.parametrize("address", ["0", "127.0.0.1:0", "[::1]:0"])
def test_an_address_is_a_port_of_loopback_or_says_where(address: str) -> None:
    with exposition.listen(address) as listener:
        assert listener.getsockname()[0] in ("127.0.0.1", "::1")
