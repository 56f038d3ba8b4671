"""S2..S7 of the patch "ksm: fix endless loop on oom" on real processes. docs/oom.md has the table of them.

S1, and all of them with scripted faults, on the simulated address space: tests/ksmd/test_ksm_fix_promises.py.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.memory_cgroup import UNLIMITED, MemoryCgroup
from benchmarks.oom import Worker, anonymous, rows, samepage, wait_merged
from benchmarks.processes import environment, wait_until
from samepage.memory import PAGE_SIZE
from samepage.service.control import Client
from tests.oom.conftest import MIB, Start, needs_agent

pytestmark = needs_agent

LIMIT = 120 * MIB


def counters(socket: str) -> dict[str, int]:
    with Client(socket) as client:
        answer: dict[str, int] = client.ask("status")["counters"]
        return answer


def knob(socket: str, name: str) -> str:
    with Client(socket) as client:
        return str(client.ask("get", knob=name)["knobs"][name])


@pytest.fixture
def tight(start: Start, socket: str, group: MemoryCgroup) -> list[Worker]:
    """Two merged workers of 128 MiB, in a cgroup where there is not room for one of them unmerged. ksmd is stopped."""
    workers = [start(128, 16) for _ in range(2)]
    for worker in workers:
        worker.ask("register")
    wait_merged(socket, workers)
    samepage(socket, "set", "run", "0")
    group.set_limit(LIMIT)
    return workers


def merged(socket: str, worker: Worker) -> int:
    return int(rows(socket)[worker.pid]["merged"])


# ---- S2: stops at the first error, or when asked to; going on is calling again ----


def test_s2_what_was_done_stays_done_and_the_rest_stays_merged(
    tight: list[Worker], socket: str, group: MemoryCgroup
) -> None:
    answer = tight[0].ask("region")
    assert answer["errno"] == "ENOMEM"
    assert 0 < answer["pages_unmerged"] < tight[0].pages
    assert answer["pages_unmerged"] + answer["pages_remaining"] == tight[0].pages
    assert answer["bytes_available"] < answer["bytes_needed"] == answer["pages_remaining"] * PAGE_SIZE
    assert group.usage() > LIMIT - 24 * MIB  # all but the reserve, and less than a batch, was used
    again = tight[0].ask("region")
    assert (again["errno"], again["pages_unmerged"]) == ("ENOMEM", 0)
    group.set_limit(UNLIMITED)
    assert tight[0].ask("region")["errno"] is None
    assert tight[0].ask("verify")
    assert tight[1].ask("verify")
    assert group.killed() == 0


def test_s2_ctrl_c_stops_samepage_unmerge_and_it_says_where_it_stands(start: Start, socket: str) -> None:
    workers = [start(512, 32) for _ in range(2)]
    for worker in workers:
        worker.ask("advise")
    wait_merged(socket, workers)
    samepage(socket, "set", "run", "0")
    before, all_of_it = anonymous(workers[0].pid), merged(socket, workers[0])
    command = [sys.executable, "-m", "samepage", "unmerge", "--pid", str(workers[0].pid), "--json", "--socket", socket]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as unmerge:
        wait_until(lambda: anonymous(workers[0].pid) > before + 8 * MIB, "begun", 60, every=0.0)
        unmerge.send_signal(signal.SIGINT)
        out, err = unmerge.communicate(timeout=60)
    answer = json.loads(out)
    assert (unmerge.returncode, answer["errno"], err.count("\n")) == (1, "EINTR", 1)
    assert "interrupted" in err
    assert answer["pages_unmerged"] > 0
    assert answer["pages_unmerged"] + answer["pages_remaining"] == all_of_it
    assert merged(socket, workers[0]) == answer["pages_remaining"]
    assert json.loads(samepage(socket, "unmerge", "--json").stdout)["pages_remaining"] == 0
    assert all(worker.ask("verify") for worker in workers)


def test_s2_a_signal_handler_that_returns_lets_the_unmerge_go_on(start: Start, socket: str) -> None:
    worker = start(256, 16)
    worker.ask("register")
    wait_merged(socket, [worker])
    answer = worker.ask("interrupted", False, 0.001, 0.001)
    assert answer["errno"] is None
    assert answer["handled"] > 1
    assert not answer["registered"]
    assert worker.ask("verify")


def test_s2_a_signal_handler_that_raises_leaves_everything_as_it_is(start: Start, socket: str) -> None:
    worker = start(256, 16)
    worker.ask("register")
    wait_merged(socket, [worker])
    samepage(socket, "set", "run", "0")
    answer = worker.ask("interrupted", True, 0.003, 0)
    assert (answer["errno"], answer["handled"], answer["registered"]) == ("EINTR", 1, True)
    assert worker.ask("verify")
    answer = worker.ask("region")
    assert (answer["errno"], answer["registered"]) == (None, False)
    assert worker.ask("verify")


# ---- S3 and S6: run = 2 ----


def test_s3_and_s6_run_2_that_fails_sets_run_to_0_and_leaves_full_scans(
    tight: list[Worker], socket: str, group: MemoryCgroup
) -> None:
    scans, all_of_it = counters(socket)["full_scans"], sum(merged(socket, worker) for worker in tight)
    assert scans > 0
    done = samepage(socket, "set", "run", "2")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    said = re.search(r"Cannot allocate memory: (\d+) pages unmerged, (\d+) remain merged; (\d+) bytes", done.stderr)
    assert said is not None, done.stderr
    unmerged, remain = int(said[1]), int(said[2])
    assert unmerged > 0, done.stderr
    assert unmerged + remain == all_of_it
    assert knob(socket, "run") == "0"
    found = counters(socket)
    assert (found["run"], found["full_scans"]) == (0, scans)
    assert found["pages_shared"] + found["pages_sharing"] == remain

    group.set_limit(UNLIMITED)
    assert samepage(socket, "set", "run", "2").returncode == 0
    found = counters(socket)
    assert (found["run"], found["full_scans"], found["pages_shared"], found["pages_sharing"]) == (2, 0, 0, 0)
    assert all(worker.ask("verify") for worker in tight)


@pytest.mark.parametrize("fails", [True, False])
def test_s3_after_run_2_everything_is_looked_at_from_the_head(
    tight: list[Worker], socket: str, group: MemoryCgroup, fails: bool
) -> None:
    if not fails:
        group.set_limit(UNLIMITED)
    assert samepage(socket, "set", "run", "2").returncode == int(fails)
    group.set_limit(UNLIMITED)
    samepage(socket, "set", "run", "1")
    wait_merged(socket, tight)
    assert all(worker.ask("verify") for worker in tight)


# ---- S4: registering gives the true errno ----


def test_s4_registering_says_what_is_wrong(socket: str, tmp_path: Path) -> None:
    from samepage import agent

    program = """
import ctypes, errno, mmap
libc = ctypes.CDLL(None, use_errno=True)
page, merge, private = mmap.PAGESIZE, mmap.MADV_MERGEABLE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
memory = mmap.mmap(-1, 8 * page, private)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
for at, length, expected in ((address + 1, page, "EINVAL"), (address, 8 * page, 0), (page, page, "ENOMEM")):
    got = 0 if not libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t(length), merge) else ctypes.get_errno()
    assert (errno.errorcode[got] if got else 0) == expected, (at, got, expected)
import samepage
for buffer, code in ((mmap.mmap(-1, 8 * page), errno.EINVAL), (bytearray(9), errno.EINVAL)):
    try:
        samepage.register(buffer)
    except OSError as e:
        assert e.errno == code, e
    else:
        raise AssertionError("registered")
"""
    env = environment(LD_PRELOAD=str(agent.library_path()), SAMEPAGE_SOCKET=socket)
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# ---- S5: a failed unmerge leaves the area registered ----


@pytest.mark.parametrize("surface", ["region", "madvise"])
def test_s5_after_a_failed_unmerge_the_area_is_still_mergeable(
    tight: list[Worker], socket: str, group: MemoryCgroup, surface: str
) -> None:
    answer = tight[0].ask(surface)
    assert answer["errno"] == "ENOMEM"
    assert answer.get("registered", True)
    assert merged(socket, tight[0]) > 0
    group.set_limit(UNLIMITED)
    samepage(socket, "set", "run", "1")
    wait_merged(socket, tight)  # what was unmerged, too
    samepage(socket, "set", "run", "0")
    assert tight[0].ask(surface)["errno"] is None
    samepage(socket, "set", "run", "1")
    scans = counters(socket)["full_scans"]
    wait_until(lambda: counters(socket)["full_scans"] > scans + 3, "scanned", 60)
    assert merged(socket, tight[0]) == 0
    assert all(worker.ask("verify") for worker in tight)


# ---- S7: what could not be broken is tried again ----


def test_s7_what_could_not_be_unmerged_is_tried_again_until_it_can(
    tight: list[Worker], socket: str, group: MemoryCgroup
) -> None:
    done = samepage(socket, "unmerge", "--pid", str(tight[0].pid), "--json")
    assert json.loads(done.stdout)["errno"] == "ENOMEM"
    samepage(socket, "set", "run", "1")
    scans = counters(socket)["full_scans"]
    wait_until(lambda: counters(socket)["full_scans"] > scans + 2, "scanned", 60)
    assert merged(socket, tight[0]) > 0  # there is still no memory for it
    group.set_limit(UNLIMITED)
    wait_until(lambda: merged(socket, tight[0]) == 0, "unmerged", 100)
    assert tight[0].ask("verify")
    assert group.killed() == 0


def test_s7_trying_again_is_not_a_busy_loop(tight: list[Worker], socket: str) -> None:
    samepage(socket, "unmerge", "--pid", str(tight[0].pid))
    samepage(socket, "set", "run", "1")

    def spent() -> float:
        return float(counters(socket)["cpu_seconds"])

    time.sleep(1)
    before = spent()
    time.sleep(4)
    assert spent() - before < 0.8  # a fifth of one core; a loop would take all of it
