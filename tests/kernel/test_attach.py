"""`samepage attach` and `detach`: the kernel merges what the agent cannot be in, and undoes it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import kernel_ksm
from benchmarks.processes import wait_until
from samepage.kernel.attach import attach
from samepage.kernel.target import TargetError, check, name
from tests.kernel.conftest import StartHolder, mergeable, mergeable_mappings, needs_ksm, samepage

FAST = {"pages_to_scan": "100000", "sleep_millisecs": "1", "advisor_mode": "none"}


@needs_ksm
def test_static_programs_that_run_are_merged_and_detached_again(start: StartHolder) -> None:
    with kernel_ksm.borrowed(run=0, **FAST):
        holders = [start() for _ in range(3)]
        pids = [str(holder.pid) for holder in holders]
        done = samepage("attach", *pids)
        assert (done.returncode, done.stderr) == (0, "")
        assert kernel_ksm.read("run") == 1
        wait_until(lambda: all(holder.merged() >= 0.99 * holder.pages for holder in holders), "merged", 60)
        assert all(holder.intact() for holder in holders)
        assert all(holder.ask("write") == "0\n" for holder in holders)
        done = samepage("detach", *pids)
        assert (done.returncode, done.stderr) == (0, "")
        assert kernel_ksm.read("run") == 0
        assert not any(mergeable(holder.pid) or mergeable_mappings(holder.pid) for holder in holders)
        assert all(holder.intact() for holder in holders)


@needs_ksm
def test_ksmd_is_stopped_by_the_next_command_when_all_that_it_ran_for_have_ended(start: StartHolder) -> None:
    with kernel_ksm.borrowed(run=0, **FAST):
        first, second = start(1), start(1)
        assert samepage("attach", str(first.pid)).returncode == 0
        first.end()
        assert kernel_ksm.read("run") == 1
        assert samepage("detach", str(second.pid)).returncode == 0
        assert kernel_ksm.read("run") == 0


@needs_ksm
def test_where_prctl_is_unknown_each_mapping_is_advised(start: StartHolder) -> None:
    holder = start(1)
    attach(holder.pid, prctl=False)
    assert not mergeable(holder.pid)
    assert mergeable_mappings(holder.pid) >= 1
    assert holder.intact()
    assert samepage("detach", str(holder.pid)).returncode == 0
    assert not mergeable_mappings(holder.pid)


def sleeper(*before: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([*before, "sleep", "60"])
    wait_until(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n", "started")
    return process


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    made = sleeper()
    yield made
    made.kill()
    made.wait()


def refusal(pid: int) -> str:
    with pytest.raises(TargetError) as refused:
        attach(pid)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith(f"process {pid}")
    return str(refused.value)


def test_a_process_that_is_stopped_is_left_alone(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGSTOP)
    wait_until(lambda: "\nState:\tT" in Path(f"/proc/{process.pid}/status").read_text(), "stopped")
    assert "it is stopped by a signal" in refusal(process.pid)
    assert "\nState:\tT" in Path(f"/proc/{process.pid}/status").read_text()


def test_a_process_that_is_traced_is_left_alone(process: subprocess.Popen[bytes]) -> None:
    traced, end = threading.Event(), threading.Event()

    def trace() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        assert not libc.ptrace(0x4206, process.pid, 0, 0)  # PTRACE_SEIZE
        traced.set()
        end.wait()

    tracer = threading.Thread(target=trace)
    tracer.start()
    assert traced.wait(10)
    said = refusal(process.pid)
    end.set()
    tracer.join()
    assert f"it is traced already, by process {tracer.native_id} " in said


def test_a_process_that_has_ended_is_left_alone(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    wait_until(lambda: "\nState:\tZ" in Path(f"/proc/{process.pid}/status").read_text(), "ended")
    assert "its first thread has ended" in refusal(process.pid)
    process.wait()
    assert refusal(process.pid) == f"process {process.pid}: no such process"


@pytest.mark.skipif(name(2) != "kthreadd", reason="needs to see kernel threads: not in a PID namespace")
def test_a_kernel_thread_is_left_alone() -> None:
    assert "it is a kernel thread" in refusal(2)


def test_a_thread_is_no_process() -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        assert f"this is a thread of process {os.getpid()}" in refusal(thread.native_id or 0)
    finally:
        end.set()


def test_a_process_with_a_seccomp_filter_is_left_alone() -> None:
    program = (
        "import ctypes, struct, time\n"
        "code = ctypes.create_string_buffer(struct.pack('HBBI', 6, 0, 0, 0x7fff0000))\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.prctl(38, 1, 0, 0, 0)\n"
        "filter = ctypes.create_string_buffer(struct.pack('HxxxxxxP', 1, ctypes.addressof(code)))\n"
        "print(libc.prctl(22, 2, filter, 0, 0), flush=True)\n"
        "time.sleep(60)\n"
    )
    made = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert made.stdout is not None
    assert made.stdout.readline() == b"0\n"
    try:
        assert "seccomp filter" in refusal(made.pid)
    finally:
        made.kill()
        made.communicate()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make a PID namespace")
def test_a_process_in_another_namespace_is_left_alone() -> None:
    made = subprocess.Popen(["unshare", "--pid", "--fork", "--kill-child", "sleep", "60"])
    children = Path(f"/proc/{made.pid}/task/{made.pid}/children")
    wait_until(lambda: bool(children.read_text()), "started")
    try:
        assert "in another PID namespace" in refusal(int(children.read_text()))
    finally:
        made.kill()
        made.wait()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be two users")
def test_a_process_of_another_user_is_left_alone(process: subprocess.Popen[bytes]) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.setgid(65534)
        os.setuid(65534)
        try:
            check(process.pid)
        except TargetError as e:
            os.write(writing, str(e).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with open(reading) as said:
        assert said.read() == f"process {process.pid} (sleep): it is another user's (root)"


@needs_ksm
def test_one_that_is_left_alone_keeps_no_other_from_being_attached(
    start: StartHolder, process: subprocess.Popen[bytes]
) -> None:
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.1)
    holder = start(1)
    with kernel_ksm.borrowed(run=0):
        done = samepage("attach", str(process.pid), str(holder.pid))
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert mergeable(holder.pid)
        assert samepage("detach", str(holder.pid)).returncode == 0
