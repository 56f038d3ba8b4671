"""The standard streams may be closed, full or broken: the exit status of `run` is the command's all the same, the
command finds its streams as it would without samepage, and no command answers with a traceback."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from samepage import agent

LOOK = Path(__file__).with_name("look_at_streams.py")
SAMEPAGE = f'"{sys.executable}" -m samepage'

OUTPUTS = {
    "open": "",
    "closed": "{n}>&-",
    "full": "{n}>/dev/full",
    "broken": "{n}>&$BROKEN",
    "wrong way": "{n}</dev/null",
}
INPUTS = {"open": "", "closed": "<&-", "wrong way": "</dev/full"}


@pytest.fixture
def environment() -> dict[str, str]:
    path = os.pathsep.join([*(p for p in sys.path if p), str(Path(__file__).parents[2])])
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SAMEPAGE_", "PYTHON"))}
    return kept | {"PYTHONPATH": path, "SAMEPAGE_LIBRARY": str(agent.library_path())}


@pytest.fixture
def broken() -> Iterator[int]:
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


def shell(script: str, environment: dict[str, str], broken: int = -1) -> subprocess.CompletedProcess[str]:
    variables = environment | {"BROKEN": str(broken)}
    command = ["bash", "-c", script]  # for dash, descriptors have one digit
    fds = [broken] * (broken >= 0)
    return subprocess.run(command, env=variables, capture_output=True, text=True, pass_fds=fds, timeout=60)


def redirected(stdin: str, stdout: str, stderr: str) -> str:
    return " ".join([INPUTS[stdin], OUTPUTS[stdout].format(n=1), OUTPUTS[stderr].format(n=2)])


ONE = [
    *((i, "open", "open") for i in INPUTS),
    *(("open", o, "open") for o in OUTPUTS),
    *(("open", "open", e) for e in OUTPUTS),
]
SEVERAL = [("closed", o, e) for o, e in itertools.product(("closed", "full"), OUTPUTS)] + [("open", "broken", "broken")]


@pytest.mark.parametrize(("stdin", "stdout", "stderr"), dict.fromkeys(ONE + SEVERAL))
def test_the_status_is_the_commands_and_its_streams_are_as_they_were(
    environment: dict[str, str], broken: int, tmp_path: Path, stdin: str, stdout: str, stderr: str
) -> None:
    streams = redirected(stdin, stdout, stderr)
    inside = f'"{sys.executable}" -S "{LOOK}" {{0}}; {SAMEPAGE} get run >{{0}}.run; exit 3'
    plain, under = tmp_path / "plain", tmp_path / "under"
    first = shell(f"sh -c '{inside.format(plain)}' {streams}", environment, broken)
    done = shell(f"{SAMEPAGE} run -- sh -c '{inside.format(under)}' {streams}", environment, broken)
    assert (first.returncode, done.returncode) == (3, 3), done.stderr
    assert under.read_text() == plain.read_text()
    assert Path(f"{under}.run").read_text() == "1\n"
    assert "Traceback" not in done.stderr
    if stderr == "open":
        assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(("line", "status"), [("no-such-command", 127), ("/etc/passwd", 126), ("", 2), ("--set x", 2)])
@pytest.mark.parametrize("stderr", OUTPUTS)
def test_a_command_that_cannot_be_started_keeps_its_status(
    environment: dict[str, str], broken: int, line: str, status: int, stderr: str
) -> None:
    assert (
        shell(f"{SAMEPAGE} run {line} {redirected('open', 'open', stderr)}", environment, broken).returncode == status
    )


@pytest.mark.parametrize("number", [2, 9, 15])
def test_a_command_that_a_signal_ended_keeps_its_status(environment: dict[str, str], broken: int, number: int) -> None:
    streams = redirected("closed", "closed", "broken")
    done = shell(f"{SAMEPAGE} run -- sh -c 'kill -{number} $$' {streams}", environment, broken)
    assert done.returncode == 128 + number


def test_a_reader_that_has_enough_does_not_change_the_status(environment: dict[str, str]) -> None:
    command = "sh -c 'seq 100000; exit 3'"
    done = shell(f"{SAMEPAGE} run -- {command} 2>&1 | head -1; exit ${{PIPESTATUS[0]}}", environment)
    assert (done.returncode, done.stdout, done.stderr) == (3, "1\n", "")


def test_a_report_on_a_full_disk_does_not_change_the_status(environment: dict[str, str], tmp_path: Path) -> None:
    report = tmp_path / "report"
    report.mkdir()
    done = shell(f"cd {report}; {SAMEPAGE} run --json r sh -c 'cd /; rmdir {report}; exit 3'", environment)
    assert done.returncode == 3
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["--version", "--help", "scan --help", "scan $$", "scan --json - $$"])
@pytest.mark.parametrize(("stdout", "said"), [("closed", 1), ("full", 1), ("broken", 0), ("wrong way", 1)])
def test_output_that_is_lost_is_a_failure_and_one_line(
    environment: dict[str, str], broken: int, command: str, stdout: str, said: int
) -> None:
    done = shell(f"{SAMEPAGE} {command} {redirected('open', stdout, 'open')}", environment, broken)
    assert (done.returncode, done.stderr.count("\n")) == (1, said), done.stderr


@pytest.mark.parametrize("command", ["status", "status --json", "get", "get run", "unmerge", "unmerge --json"])
@pytest.mark.parametrize(("stdout", "said"), [("closed", 1), ("full", 1), ("broken", 0)])
def test_output_of_a_service_that_is_lost_is_a_failure_and_one_line(
    environment: dict[str, str], broken: int, command: str, stdout: str, said: int
) -> None:
    streams = redirected("open", stdout, "open")
    script = f"{SAMEPAGE} run -- bash -c '{SAMEPAGE} {command} {streams}; exit $(( $? + 10 ))'"
    done = shell(script, environment, broken)
    assert (done.returncode, done.stderr.count("\n")) == (11, said + 1), done.stderr


@pytest.mark.parametrize("stdout", OUTPUTS)
def test_a_daemon_does_not_need_its_streams(
    environment: dict[str, str], broken: int, tmp_path: Path, stdout: str
) -> None:
    socket = tmp_path / "socket"
    streams = redirected("closed", stdout, stdout)
    script = f"{SAMEPAGE} daemon --socket {socket} {streams} & for i in $(seq 100); do test -S {socket} && break; "
    script += f"sleep 0.1; done; {SAMEPAGE} get run --socket {socket}; kill $!; wait $!"
    done = shell(script, environment, broken)
    assert "1\n" in done.stdout
    assert not socket.exists()


def test_no_command_loads_numpy_before_it_needs_it() -> None:
    """That takes longer than most commands take to answer, and makes system calls that a seccomp filter may forbid."""
    code = "import sys; sys.modules['numpy'] = None; from samepage.commands import parser; parser()"
    subprocess.run([sys.executable, "-c", code], check=True)
