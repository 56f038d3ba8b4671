"""Of the same memory, this ksmd and the kernel's make the same: the counters end up equal."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kernel_ksm
from benchmarks.processes import service
from samepage import agent
from samepage.service.control import Client
from tests.agent.preload import compile_c

COUNTERS = (
    "pages_shared",
    "pages_sharing",
    "pages_unshared",
    "pages_volatile",
    "ksm_zero_pages",
    "stable_node_chains",
    "stable_node_dups",
)
PACE: dict[str, int | str] = {"advisor_mode": "none", "pages_to_scan": 1000, "sleep_millisecs": 5}
PATIENCE = 60.0

Counters = dict[str, int]


@dataclass(frozen=True)
class Image:
    """Processes of image.c, what the first of them is told when all has settled, and knobs. `shared`: pages of children
    that a fork still shares after each step; the kernel counts them as volatile, and samepage does not look at them."""

    processes: list[str]
    steps: list[str] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)
    knobs: dict[str, int] = field(default_factory=dict)


IMAGES = {
    "nothing in common": Image(["d512@1", "d512@2"]),
    "mostly the same": Image(["d300@1 d100@2", "d300@1 d50@3", "d10@1"]),
    "zeros, as the zero page": Image(["z400 d100@1", "z50 d100@1 d30@2"], knobs={"use_zero_pages": 1}),
    "zeros, as pages like others": Image(["z400 d100@1", "z50 d100@1 d30@2"], knobs={"use_zero_pages": 0}),
    "forked": Image(["d200@1"], ["fork", "fork"], [200, 400]),
    "merged, then forked": Image(["d200@1 c50@2", "d100@1"], ["fork"], [100]),
    "forked, then rewritten": Image(["d200@1"], ["fork", "rewrite 120"], [200, 80]),
    "volatile": Image(["v100 d200@1", "d200@1 v50"]),
    "many copies": Image(["c1000@1", "c700@1 c257@2 c513@3"]),
    "many copies, few to a page": Image(["c1001@1 c11@2", "c5@2 c21@3"], knobs={"max_page_sharing": 10}),
}


class Kernel:
    """The kernel's KSM."""

    environment: dict[str, str] = {}  # noqa: RUF012

    def counters(self) -> Counters:
        return {name: kernel_ksm.read(name) for name in ("full_scans", *COUNTERS)}


@dataclass
class Samepage:
    """A daemon."""

    socket: str

    @property
    def environment(self) -> dict[str, str]:
        """Nothing is merged but what is advised."""
        return {
            "LD_PRELOAD": str(agent.library_path()),
            "SAMEPAGE_SOCKET": self.socket,
            "SAMEPAGE_MIN_ALLOC": str(1 << 40),
        }

    def set(self, name: str, value: Any) -> None:
        with Client(self.socket, timeout=None) as client:
            client.ask("set", knob=name, value=str(value))

    def counters(self) -> Counters:
        with Client(self.socket) as client:
            counters: Counters = client.ask("status")["counters"]
        return {name: counters[name] for name in ("full_scans", *COUNTERS)}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_c(Path(__file__).with_name("image.c"), tmp_path_factory.mktemp("image") / "image", "-pthread")


@pytest.fixture(scope="module")
def samepage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Samepage]:
    with service(tmp_path_factory.mktemp("service")) as socket:
        yield Samepage(socket)


def settled(counters: Callable[[], Counters], pages: int) -> Counters:
    """What the counters are once so many pages are known, and they stayed the same for four passes."""
    deadline = time.monotonic() + PATIENCE
    since = last = counters()
    while last["full_scans"] < since["full_scans"] + 4 or sum(last[name] for name in COUNTERS[:5]) != pages:
        assert time.monotonic() < deadline, f"{pages} pages do not settle: {since}, {last}"
        time.sleep(0.01)
        last = counters()
        if any(last[name] != since[name] for name in COUNTERS):
            since = last
    return {name: last[name] for name in COUNTERS}


def run(program: Path, image: Image, ksm: Kernel | Samepage) -> list[Counters]:
    """What the counters are at the beginning and after each step."""
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [str(program), *words.split()],
                    env=os.environ | ksm.environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for words in image.processes
        ]
        first = processes[0]
        assert first.stdin is not None
        assert first.stdout is not None
        assert [p.stdout.readline() for p in processes if p.stdout] == ["ready\n"] * len(processes)
        pages = [sum(int(word[1:].partition("@")[0]) for word in words.split()) for words in image.processes]
        found = [settled(ksm.counters, sum(pages))]
        for step, shared in zip(image.steps, image.shared or [0] * len(image.steps), strict=True):
            print(step, file=first.stdin, flush=True)
            assert first.stdout.readline() == "done\n"
            pages += [pages[0]] if step == "fork" else []
            unseen = shared if isinstance(ksm, Samepage) else 0
            found.append(settled(ksm.counters, sum(pages) - unseen))
            found[-1]["pages_volatile"] += unseen
        return found


@pytest.mark.skipif(not kernel_ksm.available(), reason="needs the kernel's KSM, and root to set it")
@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES.keys())
def test_the_counters_end_up_as_the_kernels_do(program: Path, samepage: Samepage, image: Image) -> None:
    knobs = {"use_zero_pages": 0, "max_page_sharing": 256, "smart_scan": 1} | image.knobs
    # With smart_scan the kernel takes pages that it passes over out of its unstable tree, and counts them as volatile.
    with kernel_ksm.borrowed(**PACE | knobs | {"smart_scan": 0}):
        kernel_ksm.write("run", 2)
        kernel_ksm.write("run", 1)
        time.sleep(0.2)
        if any(Kernel().counters().values()):
            pytest.skip("other programs on this machine have mergeable memory, which the kernel's KSM counts as well")
        kernel = run(program, image, Kernel())
    for name, value in (PACE | knobs).items():
        samepage.set(name, value)
    assert run(program, image, samepage) == kernel
