"""A service that is stuck or gone hangs nobody, and however anything ends, no mount is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.sysfs.conftest import Tree, attempt, environment, mounted, needs_fuse, needs_root, until

pytestmark = needs_fuse


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_while_the_service_is_stopped_reads_and_writes_fail_and_looking_around_works(tree: Tree) -> None:
    names = os.listdir(tree.path)
    assert tree.read("run") == "1\n"
    with stopped(tree.process.pid):
        until(lambda: attempt(tree.read, "run") == "ETIMEDOUT", "a stopped service answers")
        # Who reads all the files does not wait for each.
        started = time.monotonic()
        refused = sum(attempt(tree.read, name) == "ETIMEDOUT" for name in names)
        assert refused == len(names)
        assert time.monotonic() - started < 0.5 * 2 * len(names)
        assert attempt(tree.write, "sleep_millisecs", "5") == "ETIMEDOUT"
        assert os.listdir(tree.path) == names
        assert (tree.path / "run").stat().st_size == 4096
        assert attempt(os.listdir, tree.path / ".proc") == "ETIMEDOUT"
        assert attempt((tree.path / ".proc" / str(os.getpid()) / "ksm_stat").read_text) == "ETIMEDOUT"
    until(lambda: attempt(tree.read, "run") == "1\n", "does not work again")


def test_readers_who_wait_for_a_stopped_service_can_be_killed(tree: Tree) -> None:
    with stopped(tree.process.pid):
        reader = subprocess.Popen(["cat", tree.path / "run"], stderr=subprocess.DEVNULL)
        reader.send_signal(signal.SIGKILL)
        assert reader.wait(60) == -signal.SIGKILL


def test_a_service_that_stops_in_the_middle_of_an_unmerge_does_not_hold_the_writer(tree: Tree) -> None:
    tree.merge(40_000, "slow")
    outcome: list[object] = []
    writer = threading.Thread(target=lambda: outcome.append(attempt(tree.write, "run", "2")))
    writer.start()
    until(lambda: tree.read("run") == "2\n", "not begun")
    with stopped(tree.process.pid):
        writer.join(60)
        assert outcome == ["ETIMEDOUT"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("busy", [False, True])
def test_when_the_daemon_ends_the_tree_goes(tree: Tree, number: signal.Signals, busy: bool) -> None:
    server = tree.server()
    lingering = subprocess.Popen(["sleep", "100"], cwd=tree.path if busy else None)
    with (tree.path / "run").open() if busy else open(os.devnull) as held:
        tree.process.send_signal(number)
        assert tree.process.wait(60) == (-number if number == signal.SIGKILL else 0)
        if number == signal.SIGKILL:
            until(lambda: not mounted(tree.path), "still mounted")
        assert not mounted(tree.path)
        assert os.listdir(tree.path) == []
        if busy:
            until(lambda: attempt(held.read) in ("ENOTCONN", "ECONNABORTED"), "an open file still works")
    until(lambda: not os.path.exists(f"/proc/{server}") or state(server) == "Z", "the server still runs")
    lingering.kill()
    lingering.wait()


def state(pid: int) -> str:
    """As in ps; an orphan may stay a zombie where nobody reaps orphans."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_when_the_server_of_the_files_is_killed_the_tree_goes_and_the_daemon_stays(tree: Tree) -> None:
    os.kill(tree.server(), signal.SIGKILL)
    until(lambda: not mounted(tree.path), "still mounted")
    assert os.listdir(tree.path) == []
    assert tree.process.poll() is None
    command = [sys.executable, "-m", "samepage", "get", "run", "--socket", tree.socket]
    assert subprocess.check_output(command, env=environment(), text=True) == "1\n"
    tree.process.terminate()
    assert tree.process.wait(60) == 0


@needs_root
def test_who_unmounts_the_tree_ends_its_server_only(tree: Tree) -> None:
    server = tree.server()
    subprocess.run(["umount", tree.path], check=True)
    until(lambda: state(server) == "Z", "the server still runs")
    tree.process.terminate()
    assert tree.process.wait(60) == 0


def test_a_second_service_takes_the_place_of_the_first(tmp_path: Path) -> None:
    """What watches over the first mount must not take the second one away."""
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
        tree = Tree(tmp_path)
        time.sleep(0.2)
        assert tree.read("run") == "1\n"
        tree.process.send_signal(number)
        tree.process.wait(60)
        tree.end()


@pytest.mark.parametrize("kill", ["nobody", "run", "service"])
@pytest.mark.parametrize("option", ["--mount", "--sysfs"])
def test_when_samepage_run_ends_the_tree_goes(tmp_path: Path, kill: str, option: str) -> None:
    if option == "--sysfs" and os.geteuid() != 0:
        pytest.skip("needs root")
    directory, temporary = tmp_path / "tree", tmp_path / "tmp"
    for folder in (directory, temporary):
        folder.mkdir()
    command = [sys.executable, "-m", "samepage", "run", "--sysfs" if option == "--sysfs" else f"--mount={directory}"]
    env = environment(TMPDIR=str(temporary), XDG_RUNTIME_DIR="")
    command += ["sh", "-c", "echo ready; read end"]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"ready\n"
        mounts = [directory] if option == "--mount" else [p for p in temporary.iterdir() if not (p / "socket").exists()]
        assert [mounted(point) for point in mounts] == [True]
        children = {child: Path(f"/proc/{child}/comm").read_text().strip() for child in descendants(run.pid)}
        if kill != "nobody":
            # The service was forked first, and then the process that lives in the namespace.
            service = min(child for child, comm in children.items() if comm not in ("sh", "samepage-sysfs"))
            os.kill(run.pid if kill == "run" else service, signal.SIGKILL)
            until(lambda: not any(map(mounted, mounts)), "still mounted")
        assert run.stdin is not None
        run.stdin.close()
    assert run.returncode == (-signal.SIGKILL if kill == "run" else 1)
    assert not any(map(mounted, mounts))
    until(lambda: not list(temporary.iterdir()), "something is left behind")


def descendants(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
