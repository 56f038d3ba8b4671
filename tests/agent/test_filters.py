"""Seccomp filters that a program was started under: it ends as it would, whatever they forbid."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from samepage import agent
from samepage.doctor.facts import look
from samepage.doctor.findings import hindrance
from tests.agent.preload import ROOT, Preload, build_agent, compile_c

NUMBERS = {
    "userfaultfd": 323,
    "memfd_create": 319,
    "mremap": 25,
    "clone": 56,
    "sendmsg": 46,
    "close_range": 436,
    "mbind": 237,
    "vmsplice": 278,
    "signalfd4": 289,
    "tgkill": 234,
    "set_mempolicy": 238,
    "sched_setaffinity": 203,
    "madvise": 28,
    "move_pages": 279,
    "process_madvise": 440,
    "pidfd_open": 434,
}
"""On x86-64. The last two the agent does not call by itself."""

GETPID, GETTID = 39, 186

NOT_OURS = {"process_madvise", "pidfd_open"}
FATAL = ["kill-process", "kill-thread", "trap"]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filters")
    for name in ("filter", "filtered", "bare"):
        compile_c(ROOT / "tests" / "agent" / f"{name}.c", folder / name)
    return folder


def run(command: list[str], **environment: str) -> tuple[int, str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("SAMEPAGE_")} | environment
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def under(programs: Path, action: str, call: str, *command: str) -> list[str]:
    return [str(programs / "filter"), action, str(NUMBERS[call]), *command]


@pytest.mark.parametrize("action", [*FATAL, "errno"])
def test_a_program_that_a_filter_was_put_around_under_run_is_left_alone(programs: Path, action: str) -> None:
    """Nobody tried that filter."""
    bare = run([str(programs / "filtered")])
    command = under(programs, action, "clone", str(programs / "filtered"))
    status, out, err = run(["samepage", "run", "--", *command])
    assert (status, out) == bare[:2]
    assert "filtered is under a seccomp filter" in err
    assert "no process joined" in err


def test_a_program_that_is_left_alone_ends_by_no_other_call_than_its_own(programs: Path) -> None:
    command = [str(programs / "filter"), "kill-process", f"{GETPID},{GETTID}", str(programs / "bare"), "exit"]
    assert run(command)[0] == 5
    status, _, err = run(["samepage", "run", "--", *command])
    assert (status, "bare is under a seccomp filter" in err) == (5, True), err


OF_RUN = {"clone", "sendmsg"}
"""Without which `samepage run` itself does not come to running anything."""


@pytest.mark.parametrize(
    ("action", "call"),
    [
        *(("kill-process", call) for call in NUMBERS if call not in OF_RUN | NOT_OURS),
        ("kill-thread", "userfaultfd"),
        ("trap", "mremap"),
    ],
)
def test_under_a_filter_that_kills_run_runs_the_command_without_an_agent(
    programs: Path, action: str, call: str
) -> None:
    status, out, err = run(under(programs, action, call, "samepage", "run", "--", str(programs / "filtered")))
    assert (status, out) == run([str(programs / "filtered")])[:2]
    assert f"ends processes that make system call {NUMBERS[call]}" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "call", ["userfaultfd", "memfd_create", "mbind", "process_madvise", "pidfd_open", "move_pages"]
)
def test_under_a_filter_that_answers_with_an_error_the_command_ends_as_it_would(programs: Path, call: str) -> None:
    report = programs / "saved.json"
    command = ["samepage", "run", "--json", str(report), "--set", "sleep_millisecs=0", "--", str(programs / "filtered")]
    status, out, err = run(under(programs, "errno", call, *command))
    assert (status, out) == run([str(programs / "filtered")])[:2], err
    if call in NOT_OURS:
        saved = json.loads(report.read_text())
        assert saved["bytes_saved_peak"] > 20 << 20 or "move" not in saved["swap"], (saved, err)


@pytest.mark.parametrize("way", ["move", "wp"])
def test_where_no_memfd_may_be_executable_pages_are_merged_all_the_same(programs: Path, way: str) -> None:
    """vm.memfd_noexec=2 refuses all others; Linux 6.3 to 6.5 also those that say nothing of it."""
    report = programs / "saved.json"
    command = ["samepage", "run", "--swap", way, "--json", str(report), "--set", "sleep_millisecs=0"]
    noexec = [str(programs / "filter"), "errno", f"{NUMBERS['memfd_create']}!8"]  # MFD_NOEXEC_SEAL
    status, out, err = run([*noexec, *command, "--", str(programs / "filtered")])
    assert (status, out) == run([str(programs / "filtered")])[:2], err
    saved = json.loads(report.read_text())
    assert saved["bytes_saved_peak"] > 20 << 20 or hindrance(look(), way), (saved, err)


def test_what_was_tried_holds_for_as_many_filters(tmp_path: Path, programs: Path) -> None:
    """The process is under one, as who started it, or under two."""
    preload = Preload(build_agent(tmp_path), "")
    environment = {"LD_PRELOAD": str(preload.library), "SAMEPAGE_SOCKET": str(tmp_path / "nobody")}
    command = under(programs, "allow", "mbind", str(programs / "filtered"))
    for value, alone in (("1", False), ("0", True), ("2", True), ("", True)):
        status, out, err = run(command, SAMEPAGE_SECCOMP=value, **environment)
        assert (status, out) == run([str(programs / "filtered")])[:2]
        assert ("left alone" in err) == alone, (value, err)


def test_every_call_that_the_agent_makes_is_tried(tmp_path: Path, programs: Path) -> None:
    """By the names in the sources, but for what only passes through on a program's behalf, and what ends the trial."""
    sources = [path for path in (ROOT / "src/samepage/agent").rglob("*.[ch]") if path.name != "seccomp.c"]
    named = {name for path in sources for name in re.findall(r"\bSYS_\w+", path.read_text())}
    tried = (ROOT / "src/samepage/agent/hooks/seccomp.c").read_text().partition("trials[] = {")[2].partition("};")[0]
    assert {name for name in named if f"{{{name}," not in tried} <= PASSED


PASSED = {
    "SYS_brk",
    "SYS_capset",
    "SYS_chroot",
    "SYS_clone3",
    "SYS_exit",
    "SYS_fork",
    "SYS_landlock_restrict_self",
    "SYS_mlock",
    "SYS_mlock2",
    "SYS_mlockall",
    "SYS_mseal",
    "SYS_munlockall",
    "SYS_pkey_mprotect",
    "SYS_process_madvise",
    "SYS_seccomp",
    "SYS_set_mempolicy_home_node",
    "SYS_set_tid_address",
    "SYS_setfsgid",
    "SYS_setfsuid",
    "SYS_setgid",
    "SYS_setgroups",
    "SYS_setns",
    "SYS_setregid",
    "SYS_setresgid",
    "SYS_setresuid",
    "SYS_setreuid",
    "SYS_setrlimit",
    "SYS_setuid",
    "SYS_shmat",
    "SYS_shmctl",
    "SYS_unshare",
}


@pytest.mark.skipif(look().seccomp > 0, reason="this process is under filters itself")
def test_nothing_is_fatal_where_there_is_no_filter() -> None:
    assert agent.trial() == 0
