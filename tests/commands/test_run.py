"""`samepage run`: the command notices nothing, and the report tells what was saved.

The library that is preloaded here is an empty one: agents, where a test needs them, are fake. What the real agent does
is tested in tests/agent.
"""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.service import fake_agent

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shared object that does nothing."""
    folder = tmp_path_factory.mktemp("library")
    (folder / "empty.c").write_text("int empty;")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "empty.so", folder / "empty.c"], check=True)
    return folder / "empty.so"


@pytest.fixture
def environment(library: Path) -> dict[str, str]:
    path = os.pathsep.join([*(p for p in sys.path if p), str(Path(__file__).parents[2])])
    return {k: v for k, v in os.environ.items() if not k.startswith("SAMEPAGE_")} | {
        "PYTHONPATH": path,
        "SAMEPAGE_LIBRARY": str(library),
    }


@pytest.fixture
def run(environment: dict[str, str], tmp_path: Path) -> Run:
    def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "samepage", "run", *map(str, arguments)]
        defaults: dict[str, Any] = {"env": environment, "cwd": tmp_path, "timeout": 60}
        return subprocess.run(command, capture_output=True, text=True, **(defaults | options))

    return run


def start(environment: dict[str, str], *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "samepage", "run", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("status", [0, 1, 3, 255])
def test_the_exit_status_is_the_commands(run: Run, status: int) -> None:
    assert run("sh", "-c", f"exit {status}").returncode == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV])
def test_a_command_that_a_signal_ended_gives_128_and_its_number(run: Run, number: signal.Signals) -> None:
    assert run("sh", "-c", f"kill -{int(number)} $$").returncode == 128 + number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_are_passed_on(environment: dict[str, str], number: signal.Signals) -> None:
    script = f"trap 'echo got; exit 7' {int(number)}; echo ready; while :; do sleep 0.01; done"
    process = start(environment, "sh", "-c", script)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert (out, process.returncode) == ("got\n", 7)


def test_ctrl_c_reaches_the_command_once(environment: dict[str, str]) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        program = "import signal, time; n = []; signal.signal(2, lambda *_: n.append(1)); print('ready', flush=True); "
        program += "\nwhile not n: time.sleep(0.01)\ntime.sleep(0.3); raise SystemExit(40 + len(n))"
        command = [sys.executable, "-m", "samepage", "run", sys.executable, "-c", program]
        os.execve(sys.executable, command, environment)
    shown = b""
    while b"ready" not in shown:
        shown += os.read(terminal, 1000)
    os.write(terminal, b"\x03")
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 41


def test_standard_streams_are_the_commands(run: Run) -> None:
    done = run("sh", "-c", "cat; echo err >&2", input="in\n")
    assert done.stdout == "in\n"
    assert done.stderr.startswith("err\nsamepage: ")
    assert done.stderr.count("\n") == 2


def test_the_command_finds_the_service_and_the_agent(run: Run, library: Path) -> None:
    done = run("--min-alloc", "512K", "sh", "-c", 'echo "$LD_PRELOAD $SAMEPAGE_MIN_ALLOC"; test -S "$SAMEPAGE_SOCKET"')
    assert (done.stdout, done.returncode) == (f"{library} {512 << 10}\n", 0)


@pytest.mark.parametrize("memory", ["large", "mapped", "all"])
def test_the_agent_is_told_which_memory_to_take(run: Run, memory: str) -> None:
    assert run("--memory", memory, "sh", "-c", 'echo "$SAMEPAGE_MEMORY"').stdout == f"{memory}\n"


def test_all_memory_is_taken_unless_the_user_says_otherwise(run: Run) -> None:
    assert run("sh", "-c", 'echo "$SAMEPAGE_MEMORY"').stdout == "all\n"


def test_what_was_preloaded_before_stays(run: Run, environment: dict[str, str], library: Path) -> None:
    other = library.with_name("other.so")
    other.write_bytes(library.read_bytes())
    done = run("sh", "-c", 'echo "$LD_PRELOAD"', env=environment | {"LD_PRELOAD": str(other)})
    assert done.stdout == f"{library}:{other}\n"


def test_nothing_is_left_behind(run: Run, environment: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    environment.pop("XDG_RUNTIME_DIR", None)
    done = run("sh", "-c", 'dirname "$SAMEPAGE_SOCKET"', env=environment | {"TMPDIR": str(folder)})
    if os.geteuid():  # root's is where every user can connect to it
        assert done.stdout.startswith(str(folder)) or len(str(folder)) >= 64
    assert not os.path.exists(done.stdout.strip())
    assert list(folder.iterdir()) == []


def test_signals_are_as_a_shell_would_have_left_them(run: Run) -> None:
    def masks(text: str) -> list[int]:
        # Signals 32 and 33 are glibc's own: its posix_spawn() leaves them ignored, and every program sets them anew.
        return [int(line.split()[1], 16) & ~(0b11 << 31) for line in text.splitlines()]

    command = ["grep", "-E", "SigBlk|SigIgn", "/proc/self/status"]
    plain = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert masks(run(*command).stdout) == masks(plain)
    assert len(masks(plain)) == 2


def test_a_script_without_an_interpreter_line_is_run_by_the_shell(run: Run, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text('echo "$1"\n')
    script.chmod(0o755)
    assert run("./script", "hello").stdout == "hello\n"


def test_options_after_the_command_are_the_commands(run: Run) -> None:
    assert run("echo", "--json", "x").stdout == "--json x\n"
    assert run("--", "echo", "--", "-x").stdout == "-- -x\n"


@pytest.mark.parametrize(
    ("arguments", "status", "why"),
    [
        (["no-such-command"], 127, "not found"),
        (["./no-such-command"], 127, "not found"),
        (["/"], 126, "directory"),
        (["/etc/passwd"], 126, "not executable"),
        (["--json", "/no/such/directory/file", "true"], 1, "/no/such/directory/file"),
        (["--json", "/dev/null", "true"], 1, "not a regular file"),
        (["--json", "/proc/file", "true"], 1, "/proc/file"),
        (["--set", "nonsense=1", "true"], 1, "no knob nonsense"),
        (["--set", "run=7", "true"], 1, "run"),
        (["--set", "run", "true"], 2, "KNOB=VALUE"),
        (["--min-alloc", "1X", "true"], 2, "size"),
        (["--memory", "small", "true"], 2, "invalid choice"),
        (["--min-alloc", "0", "true"], 2, "size"),
        (["--reserve", "99999999999G", "true"], 2, "size"),
        (["--set", "pages_to_scan=1_0", "true"], 1, "pages_to_scan"),
        ([], 2, "COMMAND"),
    ],
)
def test_bad_input_is_one_clear_line_before_anything_starts(
    run: Run, arguments: list[str], status: int, why: str
) -> None:
    done = run(*arguments)
    assert done.returncode == status
    last = done.stderr.splitlines()[-1]
    assert why in last
    if status != 2:
        assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_report_that_cannot_be_written_keeps_the_command_from_starting(run: Run, tmp_path: Path) -> None:
    assert run("--json", "/no/such/file", "touch", "started").returncode == 1
    assert not (tmp_path / "started").exists()


def test_when_nobody_joined_the_last_line_says_why_that_may_be(run: Run) -> None:
    done = run("true")
    assert "no process joined" in done.stderr
    assert "statically linked" in done.stderr


def fake_processes(seconds: float, *seeds: int) -> list[str]:
    """A command that runs fake agents for some seconds, and the last of them six seconds longer."""
    agent = f'"{sys.executable}" "{fake_agent.__file__}" "$SAMEPAGE_SOCKET"'
    agents = [f'{agent} {seed} 512 & pids="$pids $!";' for seed in seeds]
    return ["sh", "-c", f"{' '.join(agents)} sleep {seconds}; set -- $pids; kill $1; sleep 6; kill $2"]


def test_processes_that_end_together_do_not_take_what_was_saved_last_with_them(run: Run, tmp_path: Path) -> None:
    command = fake_processes(5, 1, 1)
    command[-1] = command[-1].replace("sleep 6; ", "")
    done = run("--json", "report.json", *command)
    assert "saved 2.0 MiB at most and 2.0 MiB last" in done.stderr
    assert json.loads((tmp_path / "report.json").read_text())["bytes_saved"] == 2 << 20


def test_the_report_tells_what_was_saved_while_running_and_at_the_end(
    run: Run, environment: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "report.json"
    process = start(environment, "--json", file, *fake_processes(4, 1, 1))
    live = []
    while process.poll() is None:
        time.sleep(0.05)
        if file.exists():
            live.append(json.loads(file.read_text()))  # whole, whenever it is read
    _, err = process.communicate()
    report = json.loads(file.read_text())
    assert any(one["bytes_saved"] == 2 << 20 for one in live)
    assert report["bytes_saved_peak"] == 2 << 20
    assert "saved 2.0 MiB at most" in err
    assert "in 2 processes" in err
    assert [row["merged"] for row in report["processes"]] == [512, 512]
    assert [row["comm"] for row in report["processes"]] == ["fake", "fake"]
    assert report["processes"][0]["ended"]
    assert report["bytes_saved"] == 0  # one process alone shares with nobody
    assert report["pages_scanned"] >= 1024
    assert 10 <= report["wall_seconds"] < 40
    assert 0 < report["cpu_seconds"] < 30
    assert report["service_rss_bytes"] > 1 << 20
    assert {p.name for p in tmp_path.iterdir()} == {"report.json"}


def test_knobs_are_set_before_the_first_scan(environment: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    process = start(environment, "--json", file, "--set", "run=0", *fake_processes(2, 1, 1))
    process.communicate(timeout=60)
    report = json.loads(file.read_text())
    assert (report["run"], report["pages_scanned"], report["bytes_saved_peak"]) == (0, 0, 0)


def test_the_command_starts_fast(run: Run) -> None:
    """As CPU time of the process that starts it, which a busy machine does not change; the best of three."""
    field = "cut -d' ' -f14,15 /proc/$PPID/stat"
    ticks = min(sum(map(int, run("sh", "-c", field).stdout.split())) for _ in range(3))
    assert 0 < ticks / os.sysconf("SC_CLK_TCK") < 0.15


def test_the_service_ends_when_samepage_run_is_killed(environment: dict[str, str]) -> None:
    process = start(environment, "sh", "-c", 'echo "$SAMEPAGE_SOCKET"; exec sleep 3')
    assert process.stdout is not None
    socket = Path(process.stdout.readline().strip())
    assert socket.exists()
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while socket.parent.exists():
        assert time.monotonic() < deadline, "the service did not clean up"
        time.sleep(0.05)
    process.communicate()
