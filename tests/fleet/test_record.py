"""Recordings: what is in them, what they cost, and what becomes of them when something goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from samepage.fleet import FleetError, key, schema
from samepage.fleet.record import DAY, Budget, service_of
from tests.estimate.subject import Subject

COMMAND = [sys.executable, "-m", "samepage", "record"]
FAST = ["--cpu", "100000", "--daily", "1000G"]


@pytest.fixture
def fleet_key(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    key.make(path)
    return path


def record(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=100, **options)


def pages_of(directory: Path) -> list[dict[str, Any]]:
    return [row for look in schema.looks([directory]) for row in pq.read_table(look.pages).to_pylist()]


def test_siphash_is_siphash() -> None:
    """The vector of its authors for the message 00 01 ... 07."""
    word = np.frombuffer(bytes(range(8)), "<u8")
    assert key.siphash(bytes(range(16)), word).tolist() == [0x93F5F5799A932462]


def test_a_recording_has_every_page_with_equal_neighbours_as_one_run(tmp_path: Path, fleet_key: Path) -> None:
    with Subject() as subject:
        subject.region(100)
        subject.fill(0, [*range(1, 41), *[7] * 30, *range(1, 31)])
        done = record(subject.pid, "-o", tmp_path / "r", "--looks", 1, "--sample", 1, "--key", fleet_key, "--host", "h")
        assert done.returncode == 0, done.stderr
        pid = subject.pid
    (look,) = schema.looks([tmp_path / "r"])
    assert (look.head.host, look.head.fraction, look.head.version) == ("h", 1.0, schema.VERSION)
    mappings = pq.read_table(look.mappings).to_pylist()
    assert {row["pid"] for row in mappings} == {pid}
    rows = [row for row in pages_of(tmp_path / "r") if row["frame"]]
    ours: Counter[int] = Counter()
    for row in rows:
        ours[row["hash"]] += row["npages"]
    assert sorted(ours.values())[-1] >= 31
    (run,) = [row for row in rows if row["npages"] == 30 and row["hash"]]
    assert ours[run["hash"]] == 32  # 7 itself, and once more
    assert sum(1 for count in ours.values() if count == 2) >= 29


def test_samples_of_two_hosts_have_the_same_contents(tmp_path: Path, fleet_key: Path) -> None:
    with Subject() as one, Subject() as other:
        for subject, host in ((one, "a"), (other, "b")):
            subject.region(2000)
            subject.fill(0, [*range(1, 2001)])
            record(
                subject.pid, "-o", tmp_path / host, "--looks", 1, "--sample", 0.1, "--key", fleet_key, "--host", host
            )
    sampled = [{row["hash"] for row in pages_of(tmp_path / host) if row["hash"]} for host in "ab"]
    assert 120 < len(sampled[0] & sampled[1]) < 300


def test_hashes_with_another_key_are_others_and_are_not_joined(tmp_path: Path, fleet_key: Path) -> None:
    key.make(tmp_path / "other")
    with Subject() as subject:
        subject.region(200)
        subject.fill(0, [*range(1, 201)])
        for name, of in (("a", fleet_key), ("b", tmp_path / "other")):
            record(subject.pid, "-o", tmp_path / name, "--looks", 1, "--sample", 1, "--key", of)
    hashes = [{row["hash"] for row in pages_of(tmp_path / name)} for name in "ab"]
    assert hashes[0] & hashes[1] <= {key.ZERO}
    with pytest.raises(FleetError, match="different keys"):
        schema.looks([tmp_path / "a", tmp_path / "b"])


def test_no_key_is_made_unless_asked_for(tmp_path: Path) -> None:
    done = record(os.getpid(), "-o", tmp_path / "r", "--key", tmp_path / "k")
    assert done.returncode == 1
    assert done.stderr == (
        f"samepage: there is no key at {tmp_path}/k: copy that of the fleet to it, or make the first with --new-key\n"
    )
    assert record("--new-key", "--key", tmp_path / "k").returncode == 0
    assert (tmp_path / "k").stat().st_mode & 0o777 == 0o600
    done = record("--new-key", "--key", tmp_path / "k")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    (tmp_path / "k").chmod(0o644)
    assert "others may read" in record(os.getpid(), "-o", tmp_path / "r", "--key", tmp_path / "k").stderr


def test_what_it_cost_is_told_and_looks_wait_for_their_budget(tmp_path: Path, fleet_key: Path) -> None:
    with Subject() as subject:
        subject.region(50)
        subject.fill(0, [*range(1, 51)])
        done = record(
            *(subject.pid, "-o", tmp_path / "r", "--every", 0.2, "--looks", 2, "--sample", 1, "--cpu", 10),
            *("--daily", "1000G", "--key", fleet_key, "--json", "-"),
        )
    cost = json.loads(done.stdout)
    assert cost["looks"] == 2
    assert cost["core_percent"] <= 10.01
    files = [*(tmp_path / "r").rglob("*.parquet")]
    assert sum(file.stat().st_size for file in files) == cost["bytes_written"]
    first, second = (look.head.look for look in schema.looks([tmp_path / "r"]))
    assert second - first >= 200_000
    assert Budget(0.01, 64 << 20).pause(2.0, 1 << 20) == max(200.0, DAY / 64)


def test_a_killed_recorder_leaves_only_whole_files(tmp_path: Path, fleet_key: Path) -> None:
    with Subject() as subject:
        subject.region(2000)
        subject.fill(0, [*range(1, 2001)])
        command = [*COMMAND, str(subject.pid), "-o", str(tmp_path / "r"), "--every", "0.001", "--sample", "1", *FAST]
        with subprocess.Popen([*command, "--key", str(fleet_key)]) as recorder:
            deadline = time.monotonic() + 60
            while len([*(tmp_path / "r").rglob("*.parquet")]) < 12:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            recorder.kill()
    for look in schema.looks([tmp_path / "r"]):
        assert pq.read_table(look.pages).num_rows > 1000
    (tmp_path / "r/pages/.h.1.parquet.new").write_bytes(b"half")
    schema.forget_unfinished(tmp_path / "r", "h")
    assert not [*(tmp_path / "r").rglob("*.new")]


def test_a_recorder_that_is_ended_says_what_it_cost(tmp_path: Path, fleet_key: Path) -> None:
    with Subject() as subject:
        command = [*COMMAND, str(subject.pid), "-o", str(tmp_path / "r"), "--key", str(fleet_key)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as recorder:
            deadline = time.monotonic() + 60
            while not [*(tmp_path / "r").glob("mappings/*.parquet")]:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            recorder.send_signal(signal.SIGTERM)
            assert recorder.stdout
            assert recorder.stdout.read().startswith("1 look, ")
        assert recorder.returncode == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line(tmp_path: Path, fleet_key: Path) -> None:
    code = (
        "import errno, os, sys\n"
        "from samepage.commands import main\n"
        "def full(fd): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'r')\n"
        "real, calls = os.fsync, []\n"
        "def fsync(fd):\n"
        "    calls.append(fd)\n"
        "    (real if len(calls) < 2 else full)(fd)\n"
        "os.fsync = fsync\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    with Subject() as subject:
        done = subprocess.run(
            [sys.executable, "-c", code, "record", str(subject.pid), "-o", tmp_path / "r", "--key", fleet_key],
            capture_output=True,
            text=True,
        )
    assert (done.returncode, done.stderr) == (1, "samepage: No space left on device: r\n")
    assert [path.suffix for path in (tmp_path / "r").rglob("*") if path.is_file()] == [".parquet"]


def test_the_service_is_the_unit_without_its_instance() -> None:
    assert service_of("0::/system.slice/nginx.service\n") == "nginx.service"
    assert service_of("0::/system.slice/system-getty.slice/getty@tty1.service\n") == "getty@.service"
    assert service_of("1:memory:/\n0::/user.slice/user-0.slice/session-1.scope\n") == ""
