"""A program that says how much headroom() leaves, in a cgroup or with files made up, and takes memory."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.agent.preload import SOURCES

MIB = 1 << 20
UNLIMITED_V1 = 0x7FFFFFFFFFFFF000
# Per CPU, 64 pages that are charged and not used, and 64 pages' worth of updates that memory.stat lacks; twice
# for before and after, and some for the probe's own pages and page tables.
SLACK = 2 * 2 * 64 * 4096 * (os.cpu_count() or 1) + MIB


class Probe:
    """A running headroom_probe; see there for the verbs."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def answer(self) -> int:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the probe ended with {self.process.wait()}"
        return int(line)

    def ask(self, command: str) -> int:
        self.tell(command)
        return self.answer()

    def end(self) -> int:
        """Ends the probe; its exit status, -SIGKILL when it was killed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        return self.process.wait()


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("headroom") / "probe"
    flags = ["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}", "-pthread"]
    subprocess.run(["gcc", *flags, str(Path(__file__).with_name("headroom_probe.c")), "-o", str(target)], check=True)
    return target


# ---- files -----------------------------------------------------------------------------------------------------------

PROC = "22 27 0:21 / /proc rw,relatime - proc proc rw\n"
V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"
MEMORY_STAT_V1 = (Path(__file__).parent / "cgroup_files" / "memory.stat.v1").read_text()
MEMORY_STAT_V2 = (Path(__file__).parent / "cgroup_files" / "memory.stat.v2").read_text()
MEMINFO = (Path(__file__).parent / "cgroup_files" / "meminfo").read_text()


def edit(text: str, values: Mapping[str, int]) -> str:
    """A file of `key value` lines with other values."""
    for key, value in values.items():
        text, found = re.subn(rf"^({re.escape(key)}\s+)\d+", rf"\g<1>{value}", text, flags=re.MULTILINE)
        assert found == 1, key
    return text


class Machine:
    """The files of a machine, below a directory. Sizes are in bytes, as in the kernel's files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.meminfo(MemAvailable=8 << 30)
        self.put("/proc/sys/vm/swappiness", "60\n")

    def put(self, path: str, text: str) -> None:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def meminfo(self, **values: int) -> None:
        keys = {"anon": "Active(anon)"}
        text = edit(MEMINFO, {f"{keys.get(key, key)}:": value >> 10 for key, value in values.items()})
        self.put("/proc/meminfo", text)

    def process(self, cgroup: str, mountinfo: str) -> None:
        self.put("/proc/self/cgroup", cgroup)
        self.put("/proc/thread-self/cgroup", cgroup)
        self.put("/proc/thread-self/mountinfo", PROC + mountinfo)

    def v2(self, path: str, usage: int = 0, stat: Mapping[str, int] | None = None, **limits: int | str) -> None:
        """One cgroup. limits: max, high, min, low, swap_max, swap_current."""
        values: dict[str, int | str] = {"max": "max", "high": "max", "min": 0, "low": 0, "swap_max": "max"}
        self.put(f"{path}/cgroup.procs", "")
        for key, value in (values | {"current": usage, "swap_current": 0} | limits).items():
            self.put(f"{path}/memory.{key.replace('_', '.')}", f"{value}\n")
        self.put(f"{path}/memory.stat", edit(MEMORY_STAT_V2, stat or {}))

    def v1(
        self,
        path: str,
        usage: int = 0,
        limit: int = UNLIMITED_V1,
        stat: Mapping[str, int] | None = None,
        memsw: tuple[int, int] | None = None,
        swappiness: int = 60,
    ) -> None:
        """One cgroup. memsw: (usage, limit) of memory and swap together."""
        self.put(f"{path}/cgroup.procs", "")
        self.put(f"{path}/memory.usage_in_bytes", f"{usage}\n")
        self.put(f"{path}/memory.limit_in_bytes", f"{limit}\n")
        self.put(f"{path}/memory.swappiness", f"{swappiness}\n")
        self.put(f"{path}/memory.stat", edit(MEMORY_STAT_V1, stat or {}))
        if memsw:
            self.put(f"{path}/memory.memsw.usage_in_bytes", f"{memsw[0]}\n")
            self.put(f"{path}/memory.memsw.limit_in_bytes", f"{memsw[1]}\n")


CGROUP = "/sys/fs/cgroup"
Look = Callable[..., int]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine on v2 with the process in /a/b, where nothing is limited; tests put limits over it."""
    made = Machine(tmp_path / "machine")
    made.process("0::/a/b\n", V2_MOUNT)
    made.put(f"{CGROUP}/memory.stat", MEMORY_STAT_V2)
    made.put(f"{CGROUP}/cgroup.procs", "")
    made.v2(f"{CGROUP}/a")
    made.v2(f"{CGROUP}/a/b")
    return made


@pytest.fixture
def look(program: Path, machine: Machine) -> Look:
    def ask(verb: str = "look") -> int:
        probe = Probe([str(program), str(machine.root)])
        try:
            return probe.ask(verb)
        finally:
            assert probe.end() == 0

    return ask
