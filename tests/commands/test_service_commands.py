"""`samepage status`, `get`, `set`, `unmerge` and `daemon`, as a user calls them."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.service import fake_agent

NPAGES = 64
Samepage = Callable[..., "subprocess.CompletedProcess[str]"]


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([*(p for p in sys.path if p), str(Path(__file__).parents[2])])
    return {k: v for k, v in os.environ.items() if not k.startswith("SAMEPAGE_")} | {"PYTHONPATH": path} | more


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A daemon, and where it listens."""
    path = str(tmp_path / "socket")
    command = [sys.executable, "-m", "samepage", "daemon", "--socket", path]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"samepage: listening at {path}\n"
        yield process, path
        process.terminate()


@pytest.fixture
def samepage(daemon: tuple[subprocess.Popen[str], str]) -> Samepage:
    """Runs samepage with `$SAMEPAGE_SOCKET` set to the daemon's."""

    def samepage(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "samepage", *map(str, arguments)]
        variables = environment(**({"SAMEPAGE_SOCKET": daemon[1]} | more))
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)

    return samepage


@pytest.fixture
def two_merged(
    daemon: tuple[subprocess.Popen[str], str], samepage: Samepage, request: pytest.FixtureRequest
) -> Iterator[list[int]]:
    """The pids of two processes that share all their pages. The parameter is how they behave, if not honestly."""
    lies = [request.param] if hasattr(request, "param") else []
    command = [sys.executable, fake_agent.__file__, daemon[1], "1", str(NPAGES), *lies]
    processes = [subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL) for _ in range(2)]
    pids = [p.pid for p in processes]
    deadline = time.monotonic() + 20
    while merged(samepage) != dict.fromkeys(pids, NPAGES):
        assert time.monotonic() < deadline, "not merged in time"
    yield pids
    for process in processes:
        process.kill()
        process.wait()


def merged(samepage: Samepage) -> dict[int, int]:
    return {row["pid"]: row["merged"] for row in json.loads(samepage("status", "--json").stdout)["processes"]}


def test_status_shows_counters_and_a_row_for_every_process(samepage: Samepage, two_merged: list[int]) -> None:
    done = samepage("status")
    assert done.returncode == 0
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["pages_shared", str(NPAGES)] in lines
    assert {line[0] for line in lines if line} >= {str(pid) for pid in two_merged}
    assert "\x1b" not in done.stdout


def test_status_of_an_empty_service_says_so(samepage: Samepage) -> None:
    assert "no process has joined" in samepage("status").stdout


def test_status_as_json_is_one_object(samepage: Samepage, two_merged: list[int]) -> None:
    status = json.loads(samepage("status", "--json").stdout)
    assert status["bytes_saved"] == NPAGES * 4096
    assert sorted(row["pid"] for row in status["processes"]) == sorted(two_merged)


def test_what_was_set_is_what_is_got(samepage: Samepage) -> None:
    assert samepage("set", "sleep_millisecs", "77").returncode == 0
    assert samepage("get", "sleep_millisecs").stdout == "77\n"
    assert "sleep_millisecs 77\n" in samepage("get").stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["get", "nonsense"],
        ["set", "nonsense", "1"],
        ["set", "run", "9"],
        ["set", "run", "x"],
        ["unmerge", "--pid", "1"],
    ],
)
def test_what_cannot_be_done_is_one_line(samepage: Samepage, arguments: list[str]) -> None:
    done = samepage(*arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("samepage: ")


@pytest.mark.parametrize("arguments", [[], ["explode"], ["set", "run"], ["unmerge", "--pid", "x"], ["status", "x"]])
def test_wrong_usage_is_status_2(samepage: Samepage, arguments: list[str]) -> None:
    assert samepage(*arguments).returncode == 2


@pytest.mark.parametrize("arguments", [["status"], ["get"], ["set", "run", "1"], ["unmerge"]])
def test_without_a_service_one_line_says_what_to_do(samepage: Samepage, arguments: list[str], tmp_path: Path) -> None:
    done = samepage(*arguments, "--socket", tmp_path / "nothing")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "samepage daemon" in done.stderr


def test_unmerge_tells_how_far_it_came(samepage: Samepage, two_merged: list[int]) -> None:
    samepage("set", "run", "0")
    done = samepage("unmerge", "--pid", two_merged[0], "--json")
    assert json.loads(done.stdout) == {
        "errno": None,
        "pages_unmerged": NPAGES,
        "pages_remaining": 0,
        "bytes_needed": 0,
        "bytes_available": 1 << 40,
        "limits_unseen": False,
        "failed": [],
    }
    assert merged(samepage) == {two_merged[0]: 0, two_merged[1]: NPAGES}
    assert samepage("unmerge").stdout == f"{NPAGES} pages unmerged\n"


@pytest.mark.parametrize("two_merged", ["poor"], indirect=True)
def test_an_unmerge_without_the_memory_for_it_says_what_is_missing(samepage: Samepage, two_merged: list[int]) -> None:
    samepage("set", "run", "0")
    done = samepage("unmerge", "--json")
    answer = json.loads(done.stdout)
    (failed,) = answer.pop("failed")
    assert failed["pid"] in two_merged
    assert (failed["errno"], failed["pages_remaining"]) == ("ENOMEM", NPAGES)
    assert answer == {
        "errno": "ENOMEM",
        "pages_unmerged": 0,
        "pages_remaining": 2 * NPAGES,
        "bytes_needed": 2 * NPAGES * 4096,
        "bytes_available": 100,
        "limits_unseen": False,
    }
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "free some memory" in done.stderr
    assert merged(samepage) == dict.fromkeys(two_merged, NPAGES)
    samepage("set", "run", "1")
    failed = samepage("set", "run", "2")
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)
    assert samepage("get", "run").stdout == "0\n"


def test_a_second_daemon_is_refused(daemon: tuple[subprocess.Popen[str], str], samepage: Samepage) -> None:
    done = samepage("daemon", "--socket", daemon[1])
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "already" in done.stderr
    assert samepage("status").returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_daemon_stops_cleanly(
    daemon: tuple[subprocess.Popen[str], str], two_merged: list[int], number: signal.Signals
) -> None:
    process, path = daemon
    process.send_signal(number)
    assert process.wait(10) == 0
    assert not os.path.exists(path)
    assert all(os.path.exists(f"/proc/{pid}") for pid in two_merged)


def test_a_signal_that_does_not_interrupt_the_main_thread_ends_a_daemon_too(
    daemon: tuple[subprocess.Popen[str], str],
) -> None:
    process, _ = daemon
    others = [int(tid) for tid in os.listdir(f"/proc/{process.pid}/task") if int(tid) != process.pid]
    assert ctypes.CDLL(None).tgkill(process.pid, others[0], signal.SIGTERM) == 0
    assert process.wait(10) == 0


def test_a_daemon_replaces_the_socket_of_one_that_was_killed(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stale:
        stale.bind(path)
    command = [sys.executable, "-m", "samepage", "daemon", "--socket", path]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "listening" in process.stdout.readline()
        process.terminate()
    assert process.returncode == 0


def test_a_daemon_whose_place_does_not_exist_says_so(samepage: Samepage) -> None:
    done = samepage("daemon", "--socket", "/no/such/directory/socket")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "/no/such/directory/socket" in done.stderr
