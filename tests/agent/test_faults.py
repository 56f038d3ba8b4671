"""Each call of the agent's to the kernel fails in each way it can: no byte is wrong, and nobody sleeps for ever."""

from __future__ import annotations

import errno
import itertools
import mmap
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from samepage.memory import AREA, EXTENT, AddressSpaceGone, PageStatus
from samepage.memory.wire import Flags
from tests.agent.asked import Process
from tests.agent.preload import ROOT, SOURCES, Preload, build_agent, compile_c

HUGE, SMALL = 512, 256
PAGES = HUGE + SMALL
ALWAYS = 1 << 31

KINDS = [
    "MOVE",
    "COPY",
    "REGISTER",
    "UNREGISTER",
    "WAKE",
    "PROTECT",
    "SCAN",
    "PREAD",
    "MREMAP",
    "MMAP",
    "MPROTECT",
    "DONTNEED",
    "POPULATE",
    "COLLAPSE",
    "ADVICE",
    "MUNLOCK",
    "MSYNC",
    "PRLIMIT",
    "MBIND",
]
NOTHING, ALL, HALF, GAP = range(4)
"""What is done all the same by a call that fails."""

EVERY = "EAGAIN EBUSY EEXIST EFAULT EINTR EINVAL ENOENT ENOMEM ENOSPC EPERM ESRCH"
WAYS: dict[str, tuple[str, tuple[int, ...]]] = {
    "MOVE": (EVERY, (NOTHING, ALL, HALF)),
    "COPY": (EVERY, (NOTHING, ALL)),
    "REGISTER": ("EINVAL ENOMEM EBUSY EPERM EFAULT", (NOTHING, ALL, HALF)),
    "UNREGISTER": ("ENOMEM EINVAL EFAULT", (NOTHING, ALL, HALF)),
    "WAKE": ("EINVAL EFAULT", (NOTHING,)),
    "PROTECT": ("EAGAIN ENOENT ENOMEM EINVAL EFAULT ESRCH", (NOTHING, ALL, HALF)),
    "SCAN": ("EINTR ENOMEM EFAULT EINVAL EPERM", (NOTHING, HALF)),
    "PREAD": ("ENOMEM EIO EINTR", (NOTHING, HALF)),
    "MREMAP": ("ENOMEM EINVAL EAGAIN EPERM EFAULT", (NOTHING, GAP)),
    "MMAP": ("ENOMEM EAGAIN EEXIST EPERM", (NOTHING,)),
    "MPROTECT": ("ENOMEM EACCES", (NOTHING,)),
    "DONTNEED": ("EINVAL ENOMEM EAGAIN", (NOTHING, HALF)),
    "POPULATE": ("EAGAIN EINTR EFAULT EINVAL ENOMEM", (NOTHING, HALF)),
    "COLLAPSE": ("EBUSY EAGAIN ENOMEM EINVAL", (NOTHING,)),
    "ADVICE": ("ENOMEM EINVAL EAGAIN", (NOTHING,)),
    "MUNLOCK": ("ENOMEM EAGAIN", (NOTHING,)),
    "MSYNC": ("ENOMEM EBUSY", (NOTHING,)),
    "PRLIMIT": ("EPERM", (NOTHING,)),
    "MBIND": ("EIO ENOMEM EFAULT EINVAL EPERM", (NOTHING, ALL, HALF)),
}
"""The errors that each can return, from Linux 6.8 to 6.18 and some more, and what can have been done then."""


@dataclass(frozen=True)
class Fault:
    """From the call of number `first` on, `count` calls of the kind fail."""

    kind: str
    first: int
    count: int
    error: str
    done: int = NOTHING


RULES, RULE_WORDS = 3, 5
MOMENTS = 2 + len(KINDS) + RULES * RULE_WORDS
"""Where `struct plan` has its last two words."""


class Plan:
    """`struct plan` of faults.c."""

    def __init__(self, path: Path) -> None:
        with open(path, "w+b") as file:
            file.truncate(4096)
            self.words = np.frombuffer(mmap.mmap(file.fileno(), 4096), np.uint32)

    @property
    def calls(self) -> dict[str, int]:
        return dict(zip(KINDS, self.words[2:].tolist(), strict=False))

    @property
    def moments(self) -> int:
        """How often the child that makes a step was about to change something, or just had, since `arm`."""
        return int(self.words[MOMENTS])

    def kill_at(self, moment: int) -> None:
        """Have that child killed at one of these moments, counted from 1; 0: never. Call it after `arm`."""
        self.words[MOMENTS + 1] = moment

    def arm(self, *faults: Fault) -> None:
        self.words[:] = 0
        for i, fault in enumerate(faults):
            at = 2 + len(KINDS) + RULE_WORDS * i
            error = getattr(errno, fault.error)
            self.words[at : at + RULE_WORDS] = [KINDS.index(fault.kind), fault.first, fault.count, error, fault.done]
        self.words[0] = 1

    def disarm(self) -> int:
        self.words[0] = 0
        return int(self.words[1])


class Stage:
    """A process in which calls fail, and another one when its agent has given up."""

    def __init__(self, preload: Preload, folder: Path, command: list[str], flags: int) -> None:
        self.preload, self.folder, self.command, self.flags = preload, folder, command, flags
        self.plan = Plan(folder / "plan")
        self.processes = 0
        self.begin()

    def begin(self) -> None:
        folder = self.folder / str(self.processes)
        folder.mkdir()
        self.processes += 1
        self.process = Process(
            self.preload,
            folder,
            command=self.command,
            flags=self.flags,
            SAMEPAGE_FAULTS=str(self.folder / "plan"),
        )
        self.first = self.process.address // 4096
        donation = self.process.space.donate(np.array([(self.first, PAGES)], AREA))
        assert (donation.status == PageStatus.DONE).all()
        self.segment = donation.segment

    def end(self) -> None:
        self.process.end()

    def renew(self) -> None:
        assert self.process.tell("renew") == "renewed\n"
        assert self.process.tell("change") == "changed\n"

    def merge(self) -> np.ndarray:
        """The huge page; of the small ones, a run, and some that stand alone."""
        singles = np.arange(HUGE + 150, PAGES, 3)
        extents = np.array([(0, HUGE, 0), (HUGE, 149, HUGE), *((s, 1, s) for s in singles)], EXTENT)
        extents["vpn"] += self.first
        status: np.ndarray = self.process.space.merge(self.segment, extents).status
        return status

    def break_all(self) -> int:
        return self.process.space.break_ksm(self.first, PAGES).pages_unmerged

    def merged(self) -> int:
        """Pages mapped from segments."""
        pages = 0
        for line in Path(f"/proc/{self.process.process.pid}/maps").read_text().splitlines():
            start, end = (int(x, 16) // 4096 for x in line.split()[0].split("-"))
            if "samepage (deleted)" in line:
                pages += max(0, min(end, self.first + PAGES) - max(start, self.first))
        return pages

    def check(self) -> None:
        assert self.process.tell("check") == "0\n"

    def is_well(self) -> bool:
        """Its agent merges and restores as if nothing had been."""
        self.plan.disarm()
        self.renew()
        well = bool((self.merge() == PageStatus.DONE).sum() > 500)
        return self.break_all() > 500 and self.merged() == 0 and well

    def in_time(self, seconds: float, began: float) -> None:
        assert time.monotonic() - began < seconds

    def arm(self, *faults: Fault) -> None:
        if any(fault.done == GAP for fault in faults):  # who touches the gap faults
            assert self.process.tell("pause") == "paused\n"
        self.plan.arm(*faults)

    def merge_with(self, *faults: Fault) -> None:
        self.renew()
        self.arm(*faults)
        began = time.monotonic()
        status = self.merge()
        self.in_time(5, began)
        failed = self.plan.disarm()
        self.check()
        assert self.merged() == (status == PageStatus.DONE).sum() or not failed
        self.break_all()
        self.check()

    def break_with(self, *faults: Fault) -> None:
        self.renew()
        self.merge()
        self.arm(*faults)
        began = time.monotonic()
        self.break_all()
        self.in_time(5, began)
        self.plan.disarm()
        self.check()
        self.break_all()
        self.check()

    def restore_with(self, *faults: Fault) -> None:
        """All of it was merged, and then written."""
        self.renew()
        self.merge()
        assert self.process.tell("overwrite") == "overwritten\n"
        vpn = 0
        while vpn := self.process.space.scan(vpn, 1 << 20).next_vpn:
            pass
        self.arm(*faults)
        began = time.monotonic()
        self.process.space.restore(np.array([(self.first, PAGES)], AREA))
        self.in_time(5, began)
        self.plan.disarm()
        self.check()
        self.break_all()
        self.check()


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory, preload: Preload) -> Preload:
    folder = tmp_path_factory.mktemp("faulty")
    faults = ROOT / "tests" / "agent" / "faults.c"
    return Preload(build_agent(folder, "-Wl,--wrap=pread", str(faults)), preload.merge_all)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("homes") / "homes"
    return compile_c(ROOT / "tests" / "agent" / "homes.c", built, f"-I{SOURCES}", "-pthread")


@pytest.fixture(params=["move", "write-protect"])
def stage(request: pytest.FixtureRequest, faulty: Preload, program: Path, tmp_path: Path) -> Iterator[Stage]:
    command = [str(program)]
    if request.param == "limited":  # so that mappings are moved without growing
        command = ["sh", "-c", 'ulimit -d 16777216; exec "$0"', *command]
    made = Stage(faulty, tmp_path, command, Flags.SWAP_WP if request.param == "write-protect" else 0)
    yield made
    made.end()


def each(kind: str, calls: int, sites: int, ways_each: int) -> Iterable[Fault]:
    """So many of the calls of the kind, evenly, each in so many of the ways of failing; all ways have their turn."""
    errors, dones = WAYS[kind]
    ways = [(error, done, count) for error in errors.split() for done in dones for count in (1, 3, ALWAYS)]
    # Nobody else can wake who sleeps, nor put anything where there is nothing.
    ways = [way for way in ways if way[2] != ALWAYS or (kind != "WAKE" and way[1] != GAP)]
    turn = itertools.cycle(ways)
    for first in np.unique(np.linspace(0, calls - 1, min(sites, calls)).astype(int)):
        for error, done, count in itertools.islice(turn, ways_each):
            yield Fault(kind, int(first), count, error, done)


def run_matrix(stage: Stage, step: str, kind: str, sites: int, ways_each: int) -> None:
    with_faults = {"merge": stage.merge_with, "break": stage.break_with, "restore": stage.restore_with}[step]
    with_faults()
    for fault in each(kind, stage.plan.calls[kind], sites, ways_each):
        try:
            with_faults(fault)
            if not stage.is_well():
                stage.end()
                stage.begin()
        except (AssertionError, AddressSpaceGone, ConnectionError, TimeoutError) as error:
            raise AssertionError(f"{step}: {fault}: {error}") from error


@pytest.mark.parametrize("step", ["merge", "break", "restore"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_call_that_fails_costs_a_byte(stage: Stage, step: str, kind: str) -> None:
    run_matrix(stage, step, kind, sites=14, ways_each=1)


@pytest.mark.parametrize("stage", ["limited"], indirect=True)
@pytest.mark.parametrize("step", ["merge", "break", "restore"])
@pytest.mark.parametrize("kind", ["MOVE", "MREMAP", "MMAP", "MSYNC", "PRLIMIT", "PREAD"])
def test_nor_does_one_where_there_is_a_limit(stage: Stage, step: str, kind: str) -> None:
    run_matrix(stage, step, kind, sites=14, ways_each=2)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("step", ["merge", "break", "restore"])
@pytest.mark.parametrize("kind", KINDS)
def test_nor_does_any_call_in_any_way(stage: Stage, step: str, kind: str) -> None:
    run_matrix(stage, step, kind, sites=1 << 20, ways_each=9)


@pytest.mark.parametrize("stage", ["move"], indirect=True)
def test_pages_get_home_by_any_way_that_is_left(stage: Stage) -> None:
    """All ways but one fail for good from the moment on that some pages are away."""
    for at, error in enumerate(EVERY.split()):
        for first in range(1 + at % 3, 40, 9):
            stage.merge_with(Fault("MOVE", first, ALWAYS, error))
            stage.merge_with(Fault("MOVE", first, ALWAYS, error), Fault("COPY", 0, ALWAYS, error))
            stage.merge_with(
                Fault("MOVE", first, ALWAYS, error),
                Fault("SCAN", 0, ALWAYS, "ENOMEM"),
            )
            if not stage.is_well():
                stage.end()
                stage.begin()


@pytest.mark.parametrize("stage", ["move"], indirect=True)
def test_where_no_way_is_left_the_process_is_ended_and_says_so(stage: Stage) -> None:
    stage.renew()
    stage.plan.arm(
        Fault("MOVE", 1, ALWAYS, "EBUSY"),
        Fault("COPY", 0, ALWAYS, "ENOMEM"),
        Fault("MREMAP", 0, ALWAYS, "ENOMEM"),
    )
    began = time.monotonic()
    with pytest.raises(AddressSpaceGone):
        stage.merge()
    stage.in_time(10, began)
    _, said = stage.process.process.communicate()
    assert stage.process.process.returncode == -signal.SIGILL
    assert said == "samepage: the kernel keeps pages of this process from it; ended, for they would read as zeros\n"
