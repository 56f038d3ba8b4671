"""The tree of a service that merges: what scrapers and scripts see and do."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from samepage.service.control import Client
from tests.sysfs.conftest import Tree, attempt, environment, needs_fuse, until

pytestmark = needs_fuse
NPAGES = 64


def scrape(directory: Path) -> dict[str, str]:
    """What a scraper gets: every file, one after the other, each to its end."""
    texts = {}
    for name in sorted(os.listdir(directory)):
        with (directory / name).open() as file:
            texts[name] = file.read()
    return texts


def test_the_files_say_what_status_says(tree: Tree) -> None:
    tree.merge(NPAGES)
    tree.write("run", "0")
    with Client(tree.socket) as client:
        counters, knobs = client.ask("status")["counters"], client.ask("get")["knobs"]
    shown = {name: text.rstrip("\n") for name, text in scrape(tree.path).items()}
    assert shown.pop("advisor_mode") == "none scan-time [cpu]"
    assert shown == {name: str((counters | knobs)[name]) for name in shown}
    assert shown["pages_shared"] == str(NPAGES)


def test_what_is_written_is_a_knob_of_the_service(tree: Tree) -> None:
    for value in range(58, 78):
        tree.write("sleep_millisecs", f"{value}\n")
        assert tree.read("sleep_millisecs") == f"{value}\n"  # at once
    with Client(tree.socket) as client:
        assert client.ask("get", knob="sleep_millisecs")["knobs"] == {"sleep_millisecs": "77"}
        client.ask("set", knob="sleep_millisecs", value="78")
    until(lambda: tree.read("sleep_millisecs") == "78\n", "a knob set elsewhere is not seen")


def test_knobs_only_samepage_has_are_not_in_the_tree(tree: Tree) -> None:
    assert attempt(tree.read, "max_overcommit") == attempt(tree.read, "bytes_saved") == "ENOENT"


def test_what_was_read_can_be_written_back_also_the_advisor(tree: Tree) -> None:
    tree.write("advisor_mode", "none")
    assert tree.read("advisor_mode") == "[none] scan-time\n"
    tree.write("advisor_mode", "cpu\n")
    assert tree.read("advisor_mode") == "none scan-time [cpu]\n"


def test_writing_2_to_run_unmerges_everything_and_says_when(tree: Tree) -> None:
    tree.merge(NPAGES)
    subprocess.run(["bash", "-c", "echo 2 > run"], cwd=tree.path, check=True)
    assert [tree.read(name) for name in ("run", "pages_sharing", "pages_shared", "full_scans")] == ["2\n", *["0\n"] * 3]


def test_without_the_memory_for_it_writing_2_to_run_is_refused_and_run_is_0(tree: Tree) -> None:
    tree.merge(NPAGES, "poor")
    done = subprocess.run(["bash", "-c", "echo 2 > run"], cwd=tree.path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("write error: Cannot allocate memory\n")
    assert [tree.read("run"), tree.read("pages_sharing")] == ["0\n", f"{NPAGES}\n"]


def test_a_process_that_does_not_answer_makes_writing_2_to_run_fail_and_run_is_0(tree: Tree) -> None:
    pids = tree.merge(NPAGES)
    os.kill(pids[0], signal.SIGSTOP)
    for _ in range(2):
        done = subprocess.run(["bash", "-c", "echo 2 > run"], cwd=tree.path, capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.endswith("write error: Connection timed out\n")
        assert tree.read("run") == "0\n"
    os.kill(pids[0], signal.SIGKILL)  # which takes a moment
    until(lambda: not subprocess.run(["bash", "-c", "echo 2 > run"], cwd=tree.path).returncode, "not unmerged")


def test_max_page_sharing_and_merge_across_nodes_are_busy_while_pages_are_merged(tree: Tree) -> None:
    tree.merge(NPAGES)
    for name, value in (("max_page_sharing", "300"), ("merge_across_nodes", "0")):
        done = subprocess.run(["bash", "-c", f"echo {value} > {name}"], cwd=tree.path, capture_output=True, text=True)
        assert done.stderr.endswith("write error: Device or resource busy\n")
        tree.write(name, tree.read(name))


def test_a_write_that_takes_long_keeps_no_reader_waiting_and_a_signal_ends_it(tree: Tree) -> None:
    tree.merge(40_000, "slow")  # of which 2048 are unmerged in half a second
    script = "import os; fd = os.open('run', os.O_WRONLY); print('writing', flush=True); os.write(fd, b'2')"
    command = [sys.executable, "-c", f"import signal; signal.signal(2, signal.SIG_DFL); {script}"]
    with subprocess.Popen(command, cwd=tree.path, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        until(lambda: tree.read("run") != "1\n" or writer.poll() is not None, "not begun")
        for _ in range(3):
            assert set(scrape(tree.path)) == set(os.listdir(tree.path))
        assert writer.poll() is None
        writer.send_signal(signal.SIGINT)
    assert writer.returncode == -signal.SIGINT
    until(lambda: tree.read("run") == "0\n", "not cancelled")
    assert int(tree.read("pages_sharing")) > 0


def test_an_interrupted_write_of_a_program_that_goes_on_is_eintr(tree: Tree) -> None:
    tree.merge(40_000, "slow")
    program = """
import errno, os, signal, threading
def handler(*_): raise InterruptedError  # else Python writes again
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 1)
try:
    open("run", "wb", buffering=0).write(b"2")
except InterruptedError:
    print("EINTR")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tree.path, capture_output=True, text=True)
    assert done.stdout == "EINTR\n", done.stderr
    assert tree.read("run") == "0\n"


def test_a_scrape_is_of_one_moment_however_slow_it_is(tree: Tree) -> None:
    """The profit is what sharing saves, less a little for knowing the pages: so it is in every snapshot, and not in
    two of them together."""
    for seed in (1, 1, 2, 2):
        tree.join(seed, 2048)
    until(lambda: tree.read("pages_sharing") == "4096\n", "not merged")
    stop = threading.Event()

    def disturb() -> None:
        """Unmerge and merge again, for every snapshot to be another. Not by a write: who reads on shall see that."""
        with Client(tree.socket) as client:
            while not stop.wait(0.02):
                client.ask("set", knob="run", value="2")
                client.ask("set", knob="run", value="1")

    def poll() -> None:
        """Another reader, who wants the latest."""
        while not stop.wait(0.001):
            tree.read("pages_sharing")

    def look(_: int) -> list[tuple[int, int]]:
        numbers = []
        for _ in range(15):
            began = time.monotonic()
            profit = int(tree.read("general_profit"))
            for name in ("full_scans", "max_page_sharing", "pages_scanned", "pages_shared"):
                stop.wait(0.02)
                tree.read(name)
            sharing = int(tree.read("pages_sharing"))
            if time.monotonic() - began < 0.4:  # half a second without a read would have ended the scrape
                numbers.append((profit, sharing * 4096))
        return numbers

    others = [threading.Thread(target=work) for work in (disturb, poll)]
    for thread in others:
        thread.start()
    try:
        with ThreadPoolExecutor(3) as scrapers:
            seen = [numbers for many in scrapers.map(look, range(3)) for numbers in many]
    finally:
        stop.set()
        for thread in others:
            thread.join()
    assert len(set(seen)) > 1, "nothing happened meanwhile"
    assert all(0 <= saved - profit < 1 << 20 for profit, saved in seen)


def test_a_number_that_grows_longer_is_read_whole_or_not_at_all(tree: Tree) -> None:
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for value in ("9", "123456", "77"):
                tree.write("sleep_millisecs", value)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        with (tree.path / "sleep_millisecs").open("rb", buffering=0) as held:
            for _ in range(300):
                text = b""
                held.seek(0)
                while part := held.read(2):
                    text += part
                assert text in (b"20\n", b"9\n", b"123456\n", b"77\n")
    finally:
        stop.set()
        writer.join()


def test_of_every_process_there_is_what_proc_says_of_the_kernels_ksm(tree: Tree) -> None:
    pids = tree.merge(NPAGES)
    tree.write("run", "0")
    rows = {row["pid"]: row for row in status(tree)["processes"]}
    for pid in pids:
        folder = tree.path / ".proc" / str(pid)
        assert sorted(os.listdir(folder)) == ["ksm_merging_pages", "ksm_stat"]
        assert (folder / "ksm_merging_pages").read_text() == f"{NPAGES}\n"
        assert (folder / "ksm_stat").read_text().splitlines() == [
            f"ksm_rmap_items {NPAGES}",
            "ksm_zero_pages 0",
            f"ksm_merging_pages {NPAGES}",
            f"ksm_process_profit {rows[pid]['ksm_process_profit']}",
            "ksm_merge_any: no",
            "ksm_mergeable: yes",
        ]
        assert (folder / "ksm_stat").stat().st_mode == 0o100400


def test_a_processes_numbers_have_the_kernels_format(tree: Tree) -> None:
    kernel = Path("/proc/self/ksm_stat")
    if not kernel.exists():
        pytest.skip("needs a kernel with /proc/PID/ksm_stat (6.1)")
    ours = (tree.path / ".proc" / str(os.getpid()) / "ksm_stat").read_text()

    def form(text: str) -> str:
        return re.sub(r"-?\d+|yes|no$", "V", text, flags=re.MULTILINE)

    assert form(ours) == form(kernel.read_text())


def test_processes_that_joined_are_listed_and_who_has_gone_is_gone(tree: Tree) -> None:
    assert ".proc" not in os.listdir(tree.path)
    pids = [tree.join(1, 4), tree.join(2, 4)]
    until(lambda: sorted(os.listdir(tree.path / ".proc")) == sorted(map(str, pids)), "not listed")
    os.kill(pids[0], signal.SIGKILL)
    until(lambda: os.listdir(tree.path / ".proc") == [str(pids[1])], "still listed")
    for name in ("999999999", "0", "-1", "1x", "", "run", "self"):
        assert attempt(os.stat, tree.path / ".proc" / name / "ksm_stat") == "ENOENT"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_others_may_read_the_files_as_in_sysfs_and_write_none(tree: Tree) -> None:
    pid = tree.join(1, 4)
    script = f"cat run; cat .proc/{pid}/ksm_stat; echo 0 > run; cat .proc/$$/ksm_merging_pages"
    command = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "sh", "-c", script]
    done = subprocess.run(command, cwd=tree.path, capture_output=True, text=True)
    assert done.stdout == "1\n0\n"
    assert done.stderr.count("Permission denied") == 2


def status(tree: Tree) -> dict[str, list[dict[str, int]]]:
    command = [sys.executable, "-m", "samepage", "status", "--json", "--socket", tree.socket]
    answer: dict[str, list[dict[str, int]]] = json.loads(subprocess.check_output(command, env=environment()))
    return answer
