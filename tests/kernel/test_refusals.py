"""Who is left alone, and why, in one line: nothing of the process is changed. More of these are in test_attach.py."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from pathlib import Path

import pytest

from benchmarks import kernel_ksm
from benchmarks.processes import wait_until
from samepage import agent
from samepage.kernel import unmerge as unmerging
from samepage.kernel.attach import attach
from samepage.kernel.target import TargetError, _of_its_program
from samepage.kernel.unmerge import Merged, unmerge
from tests.agent.preload import compile_c
from tests.kernel.conftest import StartHolder, mergeable_mappings, needs_ksm, samepage
from tests.oom.test_halted import freezer

PAUSE = ".globl _start\n_start: mov $29, %eax\nint $0x80\njmp _start\n"


@pytest.fixture(scope="session")
def held_off(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = Path(__file__).parents[1] / "inject" / "held_off.c"
    return compile_c(source, tmp_path_factory.mktemp("held_off") / "held_off")


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def run() -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def run(*command: str, **more: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, env=os.environ | more, stdin=pipe, stdout=pipe, text=True))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def status(pid: int) -> str:
    """Whether it runs or sleeps is its own affair, and SigQ counts for all of its user."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    said = "\n".join(
        line for line in lines if line.startswith(("State", "TracerPid", "SigP", "SigB", "SigI", "SigC", "Shd"))
    )
    return said.replace("R (running)", "S (sleeping)")


PAUSE_OF_32_BITS, CLOCK_NANOSLEEP = 29, 230


def waits_in(call: int, pid: int) -> None:
    wait_until(lambda: Path(f"/proc/{pid}/syscall").read_text().startswith(f"{call} "), "waiting", 10)


def refusal(pid: int) -> str:
    before, maps = status(pid), Path(f"/proc/{pid}/maps").read_text()
    with pytest.raises(TargetError) as refused:
        attach(pid)
    assert "\n" not in str(refused.value)
    wait_until(lambda: status(pid) == before, "as it was", 10)
    assert Path(f"/proc/{pid}/maps").read_text() == maps
    assert not mergeable_mappings(pid)
    return refused.value.why


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("strict", "it is in strict seccomp mode, which would kill it for the call"),
        ("dispatched", "it handles its own system calls (PR_SET_SYSCALL_USER_DISPATCH), as Wine does"),
        ("call of 32 bits", "it was never found where it may be held"),
    ],
)
def test_a_process_in_whose_name_no_call_can_be_made_is_left_alone(
    run: Start, held_off: Path, kind: str, why: str
) -> None:
    process = run(str(held_off), kind)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    if kind == "strict":
        wait_until(lambda: "\nSeccomp:\t1" in Path(f"/proc/{process.pid}/status").read_text(), "strict", 10)
    if kind == "call of 32 bits":
        waits_in(PAUSE_OF_32_BITS, process.pid)
    assert refusal(process.pid) == why
    if kind != "call of 32 bits":
        process.communicate("x", timeout=10)
        assert process.returncode == 0


def test_a_32_bit_program_is_left_alone(run: Start, tmp_path: Path) -> None:
    (tmp_path / "pause.s").write_text(PAUSE)
    program = str(tmp_path / "pause")
    subprocess.run(["gcc", "-m32", "-nostdlib", "-static", "-o", program, str(tmp_path / "pause.s")], check=True)
    try:
        process = run(program)
    except OSError as e:
        pytest.skip(f"needs a kernel that runs 32-bit programs: {e}")
    waits_in(PAUSE_OF_32_BITS, process.pid)
    assert refusal(process.pid) == "it is not a 64-bit program"


def test_a_process_with_the_agent_is_left_alone(run: Start) -> None:
    process = run("sleep", "60", LD_PRELOAD=str(agent.library_path()))
    waits_in(CLOCK_NANOSLEEP, process.pid)
    assert refusal(process.pid) == "samepage's agent is in it: a process is served by one engine"


def test_a_process_with_a_shadow_stack_is_left_alone() -> None:
    """Few machines have one: what the kernel would say of it."""
    assert (_of_its_program(os.getpid(), {"x86_Thread_features": "shstk wrss"}) or "").startswith(
        "it has a shadow stack"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to freeze")
@pytest.mark.parametrize("version", [1, 2])
def test_a_frozen_process_is_left_alone_and_stays_frozen(run: Start, version: int) -> None:
    group = freezer(version) / f"samepage-refusal-{os.getpid()}"
    name, frozen, thawed = ("freezer.state", "FROZEN", "THAWED") if version == 1 else ("cgroup.freeze", "1", "0")
    process = run(sys.executable, "-c", "input()")
    group.mkdir()
    try:
        (group / "cgroup.procs").write_text(str(process.pid))
        (group / name).write_text(frozen)
        seen, word = ("freezer.state", "FROZEN") if version == 1 else ("cgroup.events", "frozen 1")
        wait_until(lambda: word in (group / seen).read_text(), "frozen", 10)
        assert refusal(process.pid) == "its cgroup is frozen"
        assert word in (group / seen).read_text()
    finally:
        (group / name).write_text(thawed)
        process.kill()
        process.wait()
        group.rmdir()


@needs_ksm
def test_an_unmerge_that_is_cancelled_keeps_the_rest_merged_and_the_next_call_goes_on(
    start: StartHolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unmerging, "HOLD", 0.001)
    with kernel_ksm.borrowed(run=0, **kernel_ksm.FASTEST):
        holders = [start(32) for _ in range(2)]
        assert samepage("attach", *(str(holder.pid) for holder in holders)).returncode == 0
        wait_until(lambda: all(h.merged() >= 0.99 * h.pages for h in holders), "merged", 60)
        kernel_ksm.write("run", 0)
        merged, pid = Merged(), holders[0].pid
        answers = chain([False, False], repeat(True))
        outcome = unmerge(pid, merged, 1 << 20, cancelled=lambda: next(answers))
        assert outcome.errno == errno.errorcode[errno.EINTR]
        assert 0 < outcome.pages_unmerged < holders[0].pages
        assert outcome.pages_unmerged + outcome.pages_remaining >= 0.99 * holders[0].pages
        assert mergeable_mappings(pid)
        assert holders[0].intact()
        outcome = unmerge(pid, merged, 1 << 20)
        assert (outcome.errno, outcome.pages_remaining) == (None, 0)
        merged.close()
        assert all(holder.intact() for holder in holders)
        assert samepage("detach", *(str(holder.pid) for holder in holders)).returncode == 0
