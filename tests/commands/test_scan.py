"""`samepage scan` as people call it."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks import memory_cgroup
from benchmarks.memory_cgroup import MemoryCgroup
from samepage.estimate.report import Report
from tests.estimate.subject import Subject

Scan = Callable[..., "subprocess.CompletedProcess[str]"]
COMMAND = [sys.executable, "-m", "samepage", "scan"]


@pytest.fixture
def scan(tmp_path: Path) -> Scan:
    def scan(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [*COMMAND, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=100, **options)

    return scan


@pytest.fixture
def subject() -> Iterator[Subject]:
    """A process with 100 pages that are equal in pairs."""
    with Subject() as one:
        one.region(100)
        one.fill(0, [*range(1, 51), *range(1, 51)])
        yield one


def report_of(done: subprocess.CompletedProcess[str]) -> Report:
    assert done.returncode == 0, done.stderr
    return msgspec.json.decode(done.stdout, type=Report, strict=True)


def error(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a command that failed printed."""
    assert done.stdout == ""
    assert done.stderr.startswith("samepage: ")
    assert done.stderr.count("\n") == 1
    return done.stderr.removeprefix("samepage: ").rstrip("\n")


def test_the_tables_say_what_merging_would_save(scan: Scan, subject: Subject) -> None:
    done = scan(subject.pid)
    assert (done.returncode, done.stderr) == (0, "")
    first, *rest = done.stdout.splitlines()
    assert re.fullmatch(r"Of [\d.]+ MiB in 1 process, merging would save .+ shared already\.", first)
    for words in (
        "duplicate inside one process",
        "by page, KSM",
        "samepage run",
        str(subject.pid),
    ):
        assert any(words in line for line in rest), words
    assert "\x1b" not in done.stdout


def test_the_json_is_what_the_schema_says(scan: Scan, subject: Subject) -> None:
    report = report_of(scan(subject.pid, "--json", "-"))
    assert [source.pid for source in report.sources] == [subject.pid]
    assert report.pages.duplicate_inside >= 100
    kinds = report.pages
    parts = (kinds.unique, kinds.zero, kinds.duplicate_inside, kinds.duplicate_between, kinds.already_shared)
    assert sum(parts) + kinds.unreadable == kinds.total
    assert kinds.total == sum(m.pages.total for source in report.sources for m in source.mappings)
    shared = report.already_shared
    assert shared.fork + shared.ksm + shared.samepage + shared.zero_page == kinds.already_shared


def test_the_json_can_go_to_a_file_beside_the_tables(scan: Scan, subject: Subject, tmp_path: Path) -> None:
    done = scan(subject.pid, "--json", "out.json")
    assert "by page" in done.stdout
    assert msgspec.json.decode((tmp_path / "out.json").read_bytes(), type=Report).schema == 2


def test_every_field_of_the_json_is_documented() -> None:
    documented = (Path(__file__).parents[2] / "docs" / "scan.md").read_text()
    schema = msgspec.json.schema(Report)["$defs"]
    fields = {field for definition in schema.values() for field in definition["properties"]}
    assert {field for field in fields if f"`{field}`" not in documented} == set()


def test_processes_are_found_by_name(scan: Scan, subject: Subject) -> None:
    name = Path(f"/proc/{subject.pid}/comm").read_text().strip()
    found = {source.pid for source in report_of(scan("--name", name[:-1] + "?", "--json", "-")).sources}
    assert subject.pid in found


def test_a_name_that_nobody_has_is_told(scan: Scan) -> None:
    done = scan("--name", "no-such-*")
    assert done.returncode == 1
    assert error(done) == "no process is called no-such-*"


def test_processes_are_found_by_cgroup(scan: Scan) -> None:
    if os.geteuid() != 0 or memory_cgroup.version() is None:
        pytest.skip("needs root and the memory controller, to make memory cgroups")
    with MemoryCgroup("scan") as group:
        below = group.path / "below"
        below.mkdir()
        try:
            with Subject() as inside, Subject() as deeper, Subject() as outside:
                (group.path / "cgroup.procs").write_text(str(inside.pid))
                (below / "cgroup.procs").write_text(str(deeper.pid))
                found = [
                    {source.pid for source in report_of(scan("--cgroup", path, "--json", "-")).sources}
                    for path in (group.path, group.path.name)
                ]
        finally:
            below.rmdir()
    assert found == 2 * [{inside.pid, deeper.pid}]
    assert outside.pid not in found[0]


def test_a_cgroup_that_is_not_there_is_told(scan: Scan) -> None:
    done = scan("--cgroup", "no/such/group")
    assert done.returncode == 1
    assert error(done) == "no such cgroup: no/such/group"


def test_all_are_those_that_may_be_looked_at_but_not_the_command_itself(scan: Scan, subject: Subject) -> None:
    done = scan("--all", "--json", "-")
    report = report_of(done)
    assert {subject.pid, os.getpid()} <= {source.pid for source in report.sources}
    for line in done.stderr.splitlines():  # only what ended meanwhile is worth a word
        assert re.search("while it was looked at|left out", line)


@pytest.mark.parametrize(
    ("arguments", "status", "why"),
    [
        (["999999999"], 1, "process 999999999: no such process"),
        (["none.img"], 1, "none.img: No such file or directory"),
        (["."], 1, ".: not a regular file"),
        (["empty"], 1, "empty: the file is empty"),
        (
            ["three"],
            1,
            "three: not a memory image: no ELF core dump, and its 3 bytes are no whole number of 4096-byte pages",
        ),
        (["text"], 1, "text: not a memory image: it is text"),
        (["image", "--html", "/no/such/dir/x.html"], 1, "cannot write /no/such/dir/x.html"),
        (["image", "--json", "/no/such/dir/x.json"], 1, "cannot write /no/such/dir/x.json"),
        (["image", "--html", "."], 1, "cannot write ."),
        ([], 2, "name a PID or FILE"),
        (["image", "--watch", "0"], 2, "not a number of seconds"),
        (["image", "--watch", "x"], 2, "not a number of seconds"),
        (["image", "--looks", "3"], 2, "--looks needs --watch"),
        (["image", "--watch", "1", "--looks", "1"], 2, "not a number of looks"),
        (["image", "--sample", "0"], 2, "not a fraction"),
        (["image", "--sample", "1.5"], 2, "not a fraction"),
    ],
)
def test_bad_input_is_one_clear_line(scan: Scan, tmp_path: Path, arguments: list[str], status: int, why: str) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "three").write_bytes(b"abc")
    (tmp_path / "text").write_text("text\n" * 4096)
    (tmp_path / "image").write_bytes(bytes(4096))
    done = scan(*arguments)
    assert done.returncode == status
    if status == 1:
        assert error(done) == why
    else:
        assert why in done.stderr.splitlines()[-1]


# As the user nobody, who may not be able to read where Python and samepage are: everything is loaded before.
AS_NOBODY = """
import os, sys
import samepage, rich.console, rich.table
import samepage.commands.daemon, samepage.commands.knobs, samepage.commands.run, samepage.commands.scan
import samepage.commands.status, samepage.commands.unmerge
import samepage.estimate.html, samepage.estimate.pages, samepage.estimate.selection
import samepage.estimate.text, samepage.estimate.watch
samepage.estimate.pages.zero_checksum()
samepage.__version__ = samepage.__version__
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
sys.exit(samepage.commands.main(["scan", *sys.argv[1:]]))
"""


@pytest.fixture
def as_nobody() -> Scan:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else")

    def scan(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", AS_NOBODY, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=100)

    return scan


def test_a_process_of_somebody_else_is_told(as_nobody: Scan, subject: Subject) -> None:
    done = as_nobody(subject.pid)
    assert done.returncode == 1
    line = error(done)
    assert line.startswith(f"process {subject.pid} (")
    assert line.endswith("permission denied: it is another user's, or privileged; run as root to look at it")


def test_whoever_is_not_root_looks_at_what_is_their_own(as_nobody: Scan, subject: Subject) -> None:
    PR_SET_DUMPABLE = 4  # which a process that changes its user is not
    subject.do(f"os.setgid(65534); os.setuid(65534); ctypes.CDLL(None).prctl({PR_SET_DUMPABLE}, 1, 0, 0, 0)")
    with Subject() as roots:
        report = report_of(as_nobody(subject.pid, roots.pid, "--json", "-"))
        of_all = as_nobody("--all", "--json", "-")
    assert [source.pid for source in report.sources] == [subject.pid]
    assert len(report.problems) == 1
    assert report.page_flags == "unavailable"
    assert report.pages.duplicate_inside >= 100
    assert subject.pid in {source.pid for source in report_of(of_all).sources}
    assert re.search(r"\d+ process\w* w\w+ left out: permission denied; run as root", of_all.stderr)


def test_what_can_be_looked_at_is_kept_beside_what_cannot(scan: Scan, subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "three").write_bytes(b"abc")
    done = scan(subject.pid, "three", 999999999, "--json", "-")
    report = report_of(done)
    assert [source.pid for source in report.sources] == [subject.pid]
    assert len(report.problems) == 2
    assert done.stderr.splitlines() == [f"samepage: {problem}" for problem in report.problems]


def test_a_file_whose_name_is_a_number_can_be_named(scan: Scan, tmp_path: Path) -> None:
    (tmp_path / "1234").write_bytes(bytes(4096))
    assert report_of(scan("./1234", "--json", "-")).pages.zero == 1


def test_the_same_thing_named_twice_is_looked_at_once(scan: Scan, subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(4096))
    name = Path(f"/proc/{subject.pid}/comm").read_text().strip()
    report = report_of(scan("image", "./image", subject.pid, subject.pid, "--name", name, "--json", "-"))
    assert sum(source.pid is None for source in report.sources) == 1
    assert sum(source.pid == subject.pid for source in report.sources) == 1


def test_watch_says_how_much_stayed_the_same(scan: Scan, subject: Subject) -> None:
    watch = report_of(scan(subject.pid, "--watch", "0.2", "--looks", "3", "--json", "-")).watch
    assert watch is not None
    assert (watch.looks, watch.duplicates_unchanged) == (3, watch.duplicates)
    assert watch.duplicates >= 100
    assert watch.seconds >= 0.4
    assert "were unchanged over 2 looks" in scan(subject.pid, "--watch", "0.2").stdout


def test_a_sample_says_what_it_is_and_how_far_off(scan: Scan, subject: Subject) -> None:
    report = report_of(scan(subject.pid, "--sample", "0.5", "--json", "-"))
    assert report.look.sample == 0.5
    assert {"saved_bytes", "pages_shared", "pages_sharing"} == report.by_page.errors.keys()
    assert "of a sample of 0.5" in scan(subject.pid, "--sample", "0.5").stdout


def test_a_bar_shows_progress_on_a_terminal_and_goes(subject: Subject, tmp_path: Path) -> None:
    pid, terminal = pty.fork()
    if not pid:
        os.execv(sys.executable, [*COMMAND, str(subject.pid), "--watch", "1.5", "--json", str(tmp_path / "out")])
    shown, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 1)[0]:
            try:
                shown += os.read(terminal, 1 << 16)
            except OSError:  # the other side is closed
                break
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0
    assert b"looking" in shown
    assert "━".encode() in shown
    assert b"looking again in" in shown
    assert json.loads((tmp_path / "out").read_bytes())["watch"]["looks"] == 2


def test_ctrl_c_ends_it_at_once(subject: Subject) -> None:
    process = subprocess.Popen([*COMMAND, str(subject.pid), "--watch", "1000"], stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while b"--watch" not in Path(f"/proc/{process.pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"")


def test_a_reader_that_has_enough_is_no_failure_to_tell_of(subject: Subject) -> None:
    command = f"{' '.join(COMMAND)} {subject.pid} | head -1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.stdout.startswith("Of ")
    assert done.stderr == ""
