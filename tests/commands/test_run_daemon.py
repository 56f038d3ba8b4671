"""`samepage run` where there is a daemon for the machine, and for users who may not have userfaultfd.

Each test has a /run of its own, in a mount namespace, so that no other `samepage run` meets the daemon.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from samepage import agent

NOBODY = 65534
PAGES = "bytes(range(256)) * 16 * 1024"  # 4 MiB, of which each page is like all others
ALLOCATE = f"import time; a = bytearray({PAGES}); time.sleep(4)"
TWO = f"$P -c '{ALLOCATE}' & $P -c '{ALLOCATE}'; wait"
AS_NOBODY = f"setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups"
DAEMON = 'setsid "$PYTHON" -m samepage daemon >/dev/null & while ! test -S /run/samepage.sock; do sleep 0.05; done'


def may_be_executed_by_nobody(program: str) -> bool:
    # By a shell: setpriv still has its capabilities when it executes.
    command = [*AS_NOBODY.split(), "sh", "-c", '"$0" -c "import numpy"', program]
    return subprocess.run(command, env=environment(), capture_output=True).returncode == 0


def environment() -> dict[str, str]:
    path = os.pathsep.join([*(p for p in sys.path if p), str(Path(__file__).parents[2])])
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SAMEPAGE_", "PYTHON", "XDG_"))}
    return kept | {"PYTHONPATH": path, "PYTHON": sys.executable}


@pytest.fixture(scope="session")
def python() -> str:
    """A Python that everybody may execute."""
    if os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("setpriv"):
        pytest.skip("needs root, unshare(1) and setpriv(1), to make a daemon for the machine and become another user")
    if not agent.library_path().exists():
        pytest.skip("needs the agent")
    for program in (sys.executable, "/usr/bin/python3"):
        if os.path.exists(program) and may_be_executed_by_nobody(program):
            return program
    pytest.skip("needs a Python with numpy that another user may execute")


Within = Callable[[str], "subprocess.CompletedProcess[str]"]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where everybody may write, and below a directory that everybody may enter."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o777)
        yield Path(name)


@pytest.fixture
def within(python: str, folder: Path) -> Within:
    """Runs a script in namespaces of its own, all of whose processes end with it. $P is Python, $D the folder."""

    def within(script: str) -> subprocess.CompletedProcess[str]:
        command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c"]
        command.append(f"mount -t tmpfs -o mode=755 tmpfs /run; cd /; {script}")
        variables = environment() | {"P": python, "D": str(folder)}
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)

    return within


def start(daemon: bool) -> str:
    return DAEMON if daemon else ":"


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line.removeprefix("samepage: ") for line in done.stderr.splitlines()]


@pytest.mark.parametrize("user", ["root", "another"])
def test_run_joins_the_daemon_of_the_machine_and_says_so(within: Within, folder: Path, user: str) -> None:
    run = f"{AS_NOBODY if user == 'another' else ''} $P -m samepage run"
    done = within(f'{DAEMON}; {run} --json $D/report bash -c "{TWO}; exit 3"')
    assert done.returncode == 3
    first, last = lines(done)
    assert first == "joined the daemon at /run/samepage.sock"
    assert last.startswith("shared ")
    assert last.endswith(" in 2 processes")
    report = json.loads((folder / "report").read_text())
    assert report["daemon"] == "/run/samepage.sock"
    assert report["bytes_shared_peak"] >= 7 << 20
    assert report["processes_joined"] == len(report["processes"]) == 2


def test_of_two_commands_under_one_daemon_each_is_told_of_its_own_processes(within: Within, folder: Path) -> None:
    run = f"{AS_NOBODY} $P -m samepage run --json"
    done = within(f'{DAEMON}; {run} $D/one bash -c "{TWO}" & one=$!; {run} $D/two $P -c "{ALLOCATE}"; wait $one')
    one, two = (json.loads((folder / name).read_text()) for name in ("one", "two"))
    assert (one["processes_joined"], two["processes_joined"]) == (2, 1), done.stderr
    assert not {row["pid"] for row in one["processes"]} & {row["pid"] for row in two["processes"]}
    assert two["bytes_shared_peak"] >= 3 << 20  # with the others


def test_a_user_sees_their_own_processes_of_a_daemon_and_no_others(within: Within) -> None:
    status = f'{AS_NOBODY} $P -c "{ALLOCATE}" & sleep 2; {AS_NOBODY} $P -m samepage status --json'
    library = agent.library_path()
    export = f"export SAMEPAGE_SOCKET=/run/samepage.sock LD_PRELOAD={library}"
    done = within(f'{DAEMON}; {export}; $P -c "{ALLOCATE}" & {status}')
    (row,) = json.loads(done.stdout)["processes"]
    assert row["domain"] == str(NOBODY)


@pytest.mark.parametrize("option", ["--set run=1", "--reserve 8M"])
def test_what_is_the_daemons_to_decide_gives_the_command_a_ksmd_of_its_own(within: Within, option: str) -> None:
    done = within(f"{DAEMON}; $P -m samepage run {option} $P -m samepage get run")
    first, *_ = lines(done)
    assert first.startswith("the daemon at /run/samepage.sock is not joined: ")
    assert option.split()[0] in first
    assert (done.returncode, done.stdout) == (0, "1\n")


def test_a_user_is_told_at_the_start_what_they_do_not_get_and_what_helps(within: Within) -> None:
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text() != "0\n":
        pytest.skip("needs vm.unprivileged_userfaultfd=0")
    done = within(f'{AS_NOBODY} $P -m samepage run bash -c "echo started >&2; {TWO}"')
    first, second, last = lines(done)
    assert "samepage daemon" in first
    assert "vm.unprivileged_userfaultfd=1" in first
    assert second == "started"
    assert "want of userfaultfd" in last
    assert lines(within("$P -m samepage run bash -c 'echo started >&2'"))[0] == "started"  # root has it


@pytest.mark.parametrize("daemon", [True, False])
def test_a_program_that_root_starts_and_that_becomes_another_user_joins(
    within: Within, folder: Path, daemon: bool
) -> None:
    become = f"{AS_NOBODY} $P -c '{ALLOCATE}'"  # and executes something, as gosu, su and init scripts do
    done = within(f'{start(daemon)}; $P -m samepage run --json $D/report bash -c "{become} & {become}; wait"')
    report = json.loads((folder / "report").read_text())
    assert {row["domain"] for row in report["processes"]} == {str(NOBODY)}, done.stderr
    assert report["bytes_shared_peak" if daemon else "bytes_saved_peak"] >= 3 << 20


@pytest.mark.parametrize("daemon", [True, False])
def test_a_program_that_becomes_another_user_itself_joins_and_why_it_is_not_merged_is_said(
    within: Within, folder: Path, daemon: bool
) -> None:
    """The kernel lets such a process look at little of itself (PR_SET_DUMPABLE)."""
    become = f"$P -c 'import os; os.setgid({NOBODY}); os.setuid({NOBODY}); {ALLOCATE}'"
    done = within(f'{start(daemon)}; $P -m samepage run --json $D/report bash -c "{become} & {become}; wait"')
    report = json.loads((folder / "report").read_text())
    assert {row["domain"].split(",")[0] for row in report["processes"]} == {str(NOBODY)}, done.stderr
    assert "changed its user" in lines(done)[-1]


def test_a_daemon_that_ends_leaves_the_command_its_status(within: Within) -> None:
    done = within(f'{DAEMON}; $P -m samepage run bash -c "kill $!; sleep 1; exit 3"')
    assert done.returncode == 3
    assert "Traceback" not in done.stderr


def test_commands_find_the_daemon_of_the_machine(within: Within) -> None:
    done = within(f"{DAEMON}; {AS_NOBODY} $P -m samepage status --json; {AS_NOBODY} $P -m samepage set run 0")
    assert json.loads(done.stdout)["processes"] == []
    assert (done.returncode, len(lines(done))) == (1, 1)
    assert "belongs to another user" in done.stderr
