"""What is done inside a virtual machine. Run by `python -m tests.kernels`.

    python job.py WAY [CHECK]...

Prints a line `SAID {"check": "ok"}` after each check: "ok", "left alone: why", or what was wrong instead.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.kernels.apparmor import apparmor
from tests.kernels.barrier import barrier
from tests.kernels.kernel_engine import kernel_engine
from tests.kernels.network import network_file_system
from tests.kernels.patience import SLOW, WrongError, must, until

MIB = 1 << 20
BIN = Path(sys.executable).parent
CGROUPS = Path("/sys/fs/cgroup")
NOBODY = 65534


SERVICE = f"""
import sys
from samepage.memory import conversation
conversation.TIMEOUT *= {SLOW}
conversation.CANCEL_PATIENCE *= {SLOW}
from samepage.commands import main
sys.exit(main())
"""
"""Limits are for machines that are as fast as machines are."""

SIZE = 16 * MIB
BLOCK = 9 * 4096
"""Bytes that are used of an allocation so small that the heap serves it."""

SAME = f"""
import ctypes, sys
malloc = ctypes.CDLL(None).malloc
malloc.restype, malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
blocks = [malloc({BLOCK} + 4096) for _ in range({SIZE} // 2 // {BLOCK})]
parts = [bytearray({SIZE} // 2), *((ctypes.c_char * {BLOCK}).from_address(block + -block % 4096) for block in blocks)]
pages = [(part, at) for part in parts for at in range(0, len(part), 4096)]
for number, (part, at) in enumerate(pages, 1):
    part[at : at + 4096] = number.to_bytes(8, "little") * 512
print("built", flush=True)
for line in sys.stdin:
    right = all(part[at : at + 8] == number.to_bytes(8, "little") for number, (part, at) in enumerate(pages, 1))
    print("right" if right else "wrong", flush=True)
"""
"""A program whose copies have the same memory: half of it in one large allocation, half in the heap."""

HALF = 3072
TWICE = f"""
import mmap, sys
area = mmap.mmap(-1, {2 * HALF} << 12, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range({2 * HALF}):
    area[page << 12 : (page << 12) + 8] = (page % {HALF} + 1).to_bytes(8, "little")
print("built", flush=True)
for line in sys.stdin:
    whole = range({2 * HALF})
    right = all(area[p << 12 : (p << 12) + 8] == (p % {HALF} + 1).to_bytes(8, "little") for p in whole)
    print("right" if right else "wrong", flush=True)
"""
"""A program that has 12 MiB twice, in memory that it maps itself and does not name."""


class Program:
    """A process under the agent, which joins the service at `socket`."""

    def __init__(self, socket: str, text: str, enter: Callable[[], None]) -> None:
        from samepage import agent

        library = Path(socket).with_name("libsamepage.so")
        if not library.exists():
            shutil.copy(agent.library_path(), library)
        kept = {name: os.environ[name] for name in ("PATH", "SAMEPAGE_MEMORY")}
        self._process = subprocess.Popen(
            ["/usr/bin/python3", "-c", text],  # this one need not be there for others
            env=kept | {"LD_PRELOAD": str(library), "SAMEPAGE_SOCKET": socket},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=enter,
        )
        self.pid = self._process.pid
        self.told("built")

    def told(self, what: str) -> None:
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        must(said == f"{what}\n", f"{said!r} and not {what}, status {self._process.poll()}")

    def is_right(self) -> None:
        """Not a byte is wrong, and it lives."""
        print(file=self._process.stdin, flush=True)
        self.told("right")

    @property
    def pss(self) -> int:
        found = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{self.pid}/smaps_rollup").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else 0

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


class Service:
    """A daemon, and the programs that have joined it."""

    def __init__(self, way: str, stack: ExitStack, *options: str) -> None:
        self._way, self._stack = way, stack
        folder = tempfile.mkdtemp()
        os.chmod(folder, 0o755)
        self.socket, self._said = f"{folder}/socket", Path(f"{folder}/said")
        command = [sys.executable, "-c", SERVICE, "daemon", "--socket", self.socket, "--swap", way, *options]
        with self._said.open("w") as said:
            daemon = subprocess.Popen(command, stderr=said)
        stack.push(self._tell)
        stack.callback(daemon.wait)
        stack.callback(daemon.terminate)
        until("the daemon listens", lambda: os.path.exists(self.socket))

    def _tell(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            print(self._said.read_text(), flush=True)

    def start(self, text: str, group: Path | None = None, user: int = 0, node: int | None = None) -> Program:
        def enter() -> None:
            if group is not None:
                (group / "cgroup.procs").write_text(str(os.getpid()))
            if node is not None:
                mask = ctypes.c_ulong(1 << node)
                ctypes.CDLL(None).syscall(238, 2, ctypes.byref(mask), ctypes.c_ulong(64))  # set_mempolicy, MPOL_BIND
            if self._way == "wp":
                from samepage import agent

                agent.forbid_huge_pages()
            if user:
                os.setgroups([])
                os.setresgid(user, user, user)
                os.setresuid(user, user, user)

        program = Program(self.socket, text, enter)
        self._stack.callback(program.end)
        return program

    def ask(self, *words: str) -> tuple[int, str]:
        command = [str(BIN / "samepage"), words[0], "--socket", self.socket, *words[1:]]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    def unmerge(self, program: Program) -> tuple[int, dict[str, Any]]:
        """The status and what it says in JSON."""
        status, text = self.ask("unmerge", "--pid", str(program.pid), "--json")
        must(text.startswith("{"), text)
        answer: dict[str, Any] = json.loads(text.splitlines()[0])
        return status, answer

    def set(self, knob: str, value: object) -> None:
        status, text = self.ask("set", knob, str(value))
        must(not status, text)


def merged(programs: list[Program], saved: int, before: int) -> None:
    def smaller() -> bool:
        return before - sum(program.pss for program in programs) >= saved

    until(f"{saved // MIB} MiB are saved", smaller)


# ---- the checks ---------------------------------------------------------------------------------------------


def emulator(way: str) -> None:
    """What QEMU 7.2 gets wrong."""
    import numpy as np

    numbers = np.random.default_rng(1).integers(0, 1 << 40, 100_000)
    must((np.diff(numbers[np.argsort(numbers)]) >= 0).all(), "numpy.argsort does not sort")
    must(subprocess.run([os.environ["KERNELS_PROBE"]]).returncode == 0, "cmpxchg16b exchanges what it should not")


def left_alone(way: str, service: Service, programs: list[Program], before: int) -> str:
    """Why nothing is merged by itself; "" if something is."""
    text = ""

    def known() -> bool:
        nonlocal text
        _, text = service.ask("status")
        return all(str(program.pid) in text for program in programs)

    if way != "move":
        return ""
    until("both have joined", known)
    if "UFFDIO_MOVE" not in text:
        return ""
    time.sleep(2 * SLOW)
    now = sum(program.pss for program in programs)
    must(before - now < SIZE // 16, f"{before} bytes became {now}: {text}")
    return text.strip().splitlines()[-1]


def main_job(way: str, user: int = 0) -> str:
    """Two processes with the same memory: merged, unmerged each in its own way, and not a byte wrong."""
    with ExitStack() as stack:
        service = Service(way, stack)
        service.set("run", 0)  # else some of it is merged before all of it is there
        programs = [service.start(SAME, user=user) for _ in range(2)]
        before = sum(program.pss for program in programs)
        service.set("run", 1)
        if why := left_alone(way, service, programs, before):
            return f"left alone: {why}"
        merged(programs, SIZE * 4 // 5, before)
        status, answer = service.unmerge(programs[0])
        if user and answer.get("errno") == "ETIMEDOUT":  # a guest that did not answer is unmerged when it does
            until("it is unmerged", lambda: not service.unmerge(programs[0])[0])
            status, answer = service.unmerge(programs[0])
        must(status == 0 and not answer["pages_remaining"], answer)
        must(programs[0].pss >= SIZE * 9 // 10, f"{answer} {programs[0].pss}")
        if user:
            until("run = 2", lambda: not service.ask("set", "run", "2")[0])
        status, text = service.ask("set", "run", "2")
        grown = sum(program.pss for program in programs)
        must(status == 0 and grown >= before - SIZE // 8, f"{status} {text} {before} {grown}")
        for program in programs:
            program.is_right()
    return "ok"


@contextmanager
def cgroup(*names: str) -> Iterator[list[Path]]:
    """One below the other."""
    groups: list[Path] = []
    for name in names:
        if groups:
            (groups[-1] / "cgroup.subtree_control").write_text("+memory")
        groups.append((groups[-1] if groups else CGROUPS) / name)
        groups[-1].mkdir()
    yield groups
    for group in reversed(groups):
        for _ in range(100):
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.1)


def event(group: Path, name: str) -> int:
    found = re.search(rf"^{name} (\d+)", (group / "memory.events").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def promise(way: str, limit: str, nested: bool = False, swap_max: str = "max") -> None:
    """In a cgroup whose limit is below what an unmerge takes: ENOMEM, nobody is killed, and with the limit gone the
    same call goes on where it stopped."""
    with ExitStack() as stack:
        groups = stack.enter_context(cgroup(*(["outer", "inner"] if nested else ["group"])))
        (groups[0] / "memory.swap.max").write_text(swap_max)
        service = Service(way, stack, "--reserve", "1M")
        program = service.start(TWICE, groups[-1])
        merged([program], (HALF << 12) * 3 // 4, program.pss)
        service.set("run", 0)
        used = int((groups[0] / "memory.current").read_text())
        (groups[0] / limit).write_text(str(used + 5 * MIB))
        status, answer = service.unmerge(program)
        must(status == 1 and answer["errno"] == "ENOMEM", f"{status} {answer}, used {used}")
        must(answer["pages_remaining"], answer)
        program.is_right()
        (groups[0] / limit).write_text("max")
        status, answer = service.unmerge(program)
        must(status == 0 and not answer["pages_remaining"], answer)
        program.is_right()
        must(not event(groups[0], "oom_kill"), "somebody was killed")


def pressure(way: str) -> None:
    """Two processes that get half of what they need, the rest is in the swap: nothing is lost, nobody is killed."""
    with ExitStack() as stack:
        (group,) = stack.enter_context(cgroup("pressed"))
        (group / "memory.high").write_text(str(24 * MIB))
        service = Service(way, stack, "--reserve", "1M")
        programs = [service.start(SAME, group) for _ in range(2)]
        time.sleep(2 * SLOW)
        for _ in range(2):
            for program in programs:
                program.is_right()
        assert service.ask("set", "run", "2")[0] in (0, 1)
        for program in programs:
            program.is_right()
        must(not event(group, "oom_kill"), "somebody was killed")
        swapped = int((group / "memory.stat").read_text().partition("pgscan ")[2].split()[0] or 0)
        must(event(group, "high") and swapped, "there was no pressure")


def nodes(way: str) -> None:
    """Two NUMA nodes: with merge_across_nodes 0 what is on different ones is not merged, with 1 it is."""
    assert Path("/sys/devices/system/node/online").read_text().strip() == "0-1"
    with ExitStack() as stack:
        service = Service(way, stack)
        service.set("merge_across_nodes", 0)
        programs = [service.start(SAME, node=node) for node in (0, 1)]
        before = sum(program.pss for program in programs)
        time.sleep(2 * SLOW)
        must(before - sum(program.pss for program in programs) < SIZE // 4, "merged across nodes")
        service.set("run", 2)
        service.set("merge_across_nodes", 1)
        service.set("run", 1)
        merged(programs, SIZE * 3 // 4, before)
        for program in programs:
            program.is_right()


def torture(way: str) -> None:
    """Threads that write, discard, remap and fork, merged and unmerged without end."""
    from samepage import agent
    from tests.agent.preload import Preload
    from tests.agent.test_torture import storm

    seconds = int(5 * SLOW)
    with tempfile.TemporaryDirectory() as folder:
        command = [os.environ["KERNELS_TORTURE"], str(seconds), folder, "1", "unnamed"]
        flags = ["SWAP_WP"] if way == "wp" else []
        preload = Preload(agent.library_path(), "")
        tally = storm(preload, Path(folder), flags, command, seconds * 10, STORM_PATIENCE=str(SLOW))
    must(tally.get("merge DONE", 0) > 100, tally)
    print(tally)


def registered(way: str) -> None:
    """64 MiB of zeros that an io_uring fills by fixed reads later are not merged meanwhile, and not a word is wrong."""
    import numpy as np

    from samepage import agent
    from samepage.memory import EXTENT, ZERO_PAGE, PageStatus
    from samepage.memory.wire import Flags, Swap
    from tests.agent.asked import Process
    from tests.agent.preload import Preload
    from tests.agent.test_held import PAGES

    with tempfile.TemporaryDirectory() as folder:
        command = [os.environ["KERNELS_REGISTERED"], f"{folder}/file"]
        flags = Flags.SWAP_WP if way == "wp" else Flags(0)
        process = Process(Preload(agent.library_path(), ""), Path(folder), command=command, flags=flags)
        zeros = np.array([(process.address // 4096, 2 * PAGES, ZERO_PAGE)], EXTENT)
        done = process.space.merge(None, zeros).status == PageStatus.DONE
        wrong = process.tell("read").strip()
        swap = process.space.swap
        process.end()
    must(wrong == "0", f"{wrong} words are wrong, swapped by {swap.name.lower()}")
    must(not done[:PAGES].any(), "what is registered was merged")
    if swap in (Swap.MOVE, Swap.WP):
        must(np.count_nonzero(done[PAGES:]) > 0.9 * PAGES, f"only {np.count_nonzero(done)} others were merged")


CHECKS: dict[str, Callable[[str], str | None]] = {
    "emulator": emulator,
    "registered buffer": registered,
    "main job": main_job,
    "of another user": lambda way: main_job(way, NOBODY),
    "memory.max": lambda way: promise(way, "memory.max"),
    "memory.high": lambda way: promise(way, "memory.high"),
    "nested": lambda way: promise(way, "memory.max", nested=True),
    "memory.swap.max 0": lambda way: promise(way, "memory.max", swap_max="0"),
    "pressure": pressure,
    "no swap": lambda way: promise(way, "memory.max"),
    "two nodes": nodes,
    "torture": torture,
    "writers from outside": barrier,
    "NFS": network_file_system,
    "AppArmor": apparmor,
    "kernel engine": kernel_engine,
}
TOO_LONG = 15.0
"""Seconds that no check takes on a machine that is as fast as machines are."""

NEEDS_V2 = {"memory.max", "memory.high", "nested", "memory.swap.max 0", "pressure", "no swap", "kernel engine"}


def look_around() -> None:
    """What everybody waits for, when a check takes too long."""
    faulthandler.dump_traceback(sys.stdout, all_threads=True)
    for task in sorted(Path("/proc").glob("[0-9]*/task/[0-9]*")):
        with suppress(OSError):
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            command = (task.parents[1] / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[-80:]
            if command:  # not the kernel's own
                print(f"{task}: {state} {command}\n{(task / 'stack').read_text()}", flush=True)


def say(name: str, outcome: str) -> None:
    print("SAID " + json.dumps({name: outcome}), flush=True)


def main() -> None:
    way, *wanted = sys.argv[1:]
    print(f"{SLOW:.1f} times as slow", flush=True)
    from samepage.memory import conversation

    conversation.TIMEOUT *= SLOW
    for name in wanted or CHECKS:
        if name in NEEDS_V2 and not (CGROUPS / "cgroup.controllers").exists():
            say(name, "left alone: no cgroup version 2 here")
            continue
        if name == "no swap":
            subprocess.run(["swapoff", "-a"], check=True)
        began = time.monotonic()
        watch = threading.Timer(TOO_LONG * SLOW, look_around)
        watch.start()
        try:
            outcome = CHECKS[name](way) or "ok"
        except Exception as e:
            outcome = (str(e) if isinstance(e, WrongError) else f"{type(e).__name__}: {e}")[:2000]
        watch.cancel()
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        say(name, outcome)
        if name == "main job" and outcome.startswith("left alone"):
            return


if __name__ == "__main__":
    main()
