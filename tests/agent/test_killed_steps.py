"""The child that makes a step is killed before and after each of its calls: no byte is wrong, nothing is half done."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from samepage.memory import AREA, EXTENT, AddressSpaceGone, PageStatus
from samepage.memory.wire import Flags
from tests.agent.preload import Preload
from tests.agent.test_faults import ALWAYS, HUGE, PAGES, Fault, Stage, faulty, program

__all__ = ["faulty", "program"]

MOMENTS = int(os.environ.get("SAMEPAGE_TEST_MOMENTS", "40"))
"""How many of the moments of a step are tried, evenly."""

MOST = int(Path("/proc/sys/vm/max_map_count").read_text())
FEW = 12
MOVE, LIMITED, PROTECT, CROWDED = "move", "limited", "write-protect", "crowded"  # the last takes a second each


class Scene(Stage):
    """A process of which one step is killed."""

    def merge_some(self) -> None:
        """The huge page; a row, a few of whose pages differ; and pages that stand alone. Neighbours in memory that are
        none in the segment get mappings of their own."""
        few = [(HUGE + 40 + 3 * i, 1, HUGE + 40 + 3 * i) for i in range(4)]
        extents = np.array([(0, HUGE, 0), (HUGE, FEW, HUGE), *few], EXTENT)
        extents["vpn"] += self.first
        self.process.space.merge(self.segment, extents)

    def merge_apart(self) -> None:
        """Neighbours have mappings of their own, since the segment has them in another order."""
        order = np.arange(HUGE, HUGE + FEW)[::-1]
        other = self.process.space.donate(np.array([(self.first + p, 1) for p in order], AREA)).segment
        assert other is not None
        with closing(other):
            extents = np.array([(self.first + p, 1, at) for at, p in enumerate(order)], EXTENT)
            extents = extents[np.argsort(extents["vpn"])]
            assert (self.process.space.merge(other, extents).status == PageStatus.DONE).all()

    def restore(self) -> None:
        self.process.space.restore(np.array([(self.first + HUGE, FEW)], AREA))

    def look(self) -> None:
        for _ in self.process.look():
            pass

    def crowd(self) -> None:
        """The agent is asked for mappings, and joins pieces."""
        assert self.process.tell("crowd") == "crowded\n"

    def is_whole(self) -> None:
        """All of the area is mapped, and advised, and not watched any more."""
        smaps = Path(f"/proc/{self.process.process.pid}/smaps").read_text()
        at = self.first * 4096
        for start, end, flags in re.findall(r"^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags: (.*?)$", smaps, re.M | re.S):
            if int(start, 16) <= at < int(end, 16) and at < (self.first + PAGES) * 4096:
                assert "dc" in flags.split(), (hex(at), flags)
                assert not {"um", "ui"} & set(flags.split()), (hex(at), flags)
                at = int(end, 16)
        assert at >= (self.first + PAGES) * 4096, hex(at)


Step = Callable[[Scene], None]


def prepare_merge(scene: Scene) -> None:
    scene.renew()
    scene.process.tell("advise")


def prepare_restore(scene: Scene) -> None:
    scene.process.tell("advise")
    scene.merge_apart()
    scene.process.tell("overwrite")
    scene.look()
    scene.process.space.restore(np.array([(scene.first, 1)], AREA))  # so that it has tried already how to find holders


def prepare_rejoin(scene: Scene) -> None:
    scene.process.tell("advise")
    extents = np.array([(scene.first + HUGE + 1 + 3 * i, 1 + i % 2, HUGE + 1 + 3 * i) for i in range(4)], EXTENT)
    assert (scene.process.space.merge(scene.segment, extents).status == PageStatus.DONE).all()


NO_WAY_HOME = (Fault("MOVE", 1, ALWAYS, "EBUSY"), Fault("COPY", 0, ALWAYS, "ENOMEM"))
HELD = (Fault("MBIND", 0, ALWAYS, "EIO"),)

SCENES: dict[str, tuple[str, Step, Step, Iterable[Fault]]] = {
    "merge": (MOVE, prepare_merge, Scene.merge_some, ()),
    "merge, limited": (LIMITED, prepare_merge, Scene.merge_some, ()),
    "merge, write-protect": (PROTECT, prepare_merge, Scene.merge_some, ()),
    "merge, and no page moves home": (MOVE, prepare_merge, Scene.merge_some, NO_WAY_HOME),
    "restore": (MOVE, prepare_restore, Scene.restore, ()),
    "restore, and somebody holds pages": (MOVE, prepare_restore, Scene.restore, HELD),
    "rejoin": (CROWDED, prepare_rejoin, Scene.crowd, ()),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SCENES)
def test_a_step_may_be_killed_at_any_moment(name: str, faulty: Preload, program: Path, tmp_path: Path) -> None:
    way, prepare, step, faults = SCENES[name]
    if way == CROWDED and not 60_000 < MOST < 80_000:
        pytest.skip("needs vm.max_map_count to be what it mostly is")
    command = [str(program)]
    if way == LIMITED:
        command = ["sh", "-c", 'ulimit -d 16777216; exec "$0"', *command]
    scene = Scene(faulty, tmp_path, command, Flags.SWAP_WP if way == PROTECT else 0)
    fatal, moments, tried, killed = 0, 0, 0, 0
    step_by: float = 0
    while True:
        try:
            prepare(scene)
            assert scene.process.tell("squat") == "squatting\n"
            scene.plan.arm(*faults)
            scene.plan.kill_at(fatal)
            step(scene)
            moments_now = scene.plan.moments
            scene.plan.disarm()
            scene.check()
            scene.check()
            scene.is_whole()
            assert scene.process.tell("discard") == "0\n"
        except (AssertionError, AddressSpaceGone, ConnectionError, TimeoutError) as error:
            status = scene.process.process.poll()
            raise AssertionError(f"{name}: moment {fatal} of {moments}, status {status}: {error}") from error
        scene.end()
        if not fatal:
            moments = moments_now
            step_by = max(1.0, moments / (MOMENTS if way != CROWDED else MOMENTS // 3))
        killed += 0 < fatal <= moments_now
        tried += 1
        fatal = 1 + int((tried - 1) * step_by)
        if fatal > moments:
            break
        scene.begin()
    print(f"{name}: killed {killed} times of {tried - 1} at {moments} moments")
    assert killed > 10
