"""Random sequences of calls of the malloc family and of those that map memory, without samepage and with it.

`model/*.c` is the program, and explains what it does. A round runs one sequence without samepage, which writes down
what every call returned, then some copies of it at once under the agent (built with its books checked), which must
return the same and find their memory as it should be:

  nothing   there is no service to join
  service   one like that of `samepage run` merges what stood still
  storm     tests/agent/storm.py merges whatever looks equal, and breaks it again, without end

`python -m tests.fuzz.model --seconds N` goes on from a random seed for so long, and ends with 1 after the first
finding; `--mode`, `--under` and `--seed` run one round again, `--shrink` looks for a shorter one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.agent.preload import ROOT, WARNINGS, build_agent

SOURCES = Path(__file__).parent / "model"
CORPUS = Path(__file__).parent / "corpus" / "model.txt"
MODES = {"pages": 3000, "heap": 1000, "mixed": 2000, "many": 1000, "big": 500, "threads": 1500}
"""Steps of a round, so that one takes a few seconds."""

UNDER = ("storm", "service", "nothing")
PATIENCE = 120.0
"""Seconds until a run counts as one that hangs."""

EAGER = ["sleep_millisecs=1", "pages_to_scan=1000000", "smart_scan=0", "advisor_mode=none"]
"""Knobs of a service that looks again at once."""


@dataclass(frozen=True)
class Round:
    mode: str
    seed: int
    steps: int
    under: str

    @property
    def stealthy(self) -> bool:
        """Whether some of its calls are made by way of syscall(2)."""
        return self.seed % 2 == 1

    def __str__(self) -> str:
        return f"--mode {self.mode} --seed {self.seed} --steps {self.steps} --under {self.under}"


@dataclass
class Tally:
    rounds: int = 0
    calls: int = 0
    merged: int = 0
    """Pages: what storms merged, and the most that services had merged at one time."""
    stricter: int = 0
    """mremap that fails, and did not without samepage."""
    laxer: int = 0
    findings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.rounds} rounds, {self.calls} calls, {self.merged} pages merged; mremap fails {self.stricter} times "
            f"more and {self.laxer} less; {len(self.findings)} findings"
        )


def build(folder: Path) -> tuple[Path, Path]:
    """The program and the agent, whose books are checked."""
    program = folder / "model"
    flags = ["-std=gnu11", *WARNINGS, "-g", "-pthread"]
    subprocess.run(["gcc", *flags, *map(str, sorted(SOURCES.glob("*.c"))), "-o", str(program)], check=True)
    return program, build_agent(folder, "-g", "-DSAMEPAGE_CHECK")


@contextlib.contextmanager
def storm(folder: Path, tally: Tally, *flags: str) -> Iterator[str]:
    """Path of its socket."""
    path = folder / "storm"
    path.unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "tests" / "agent" / "storm.py"), str(path), *flags]
    with subprocess.Popen(command, env=_environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield str(path)
            process.send_signal(signal.SIGTERM)
            done = json.loads(process.stdout.read())
            tally.merged += done.get("merge DONE", 0) + done.get("huge DONE", 0)
        finally:
            process.kill()


@contextlib.contextmanager
def service(folder: Path, tally: Tally) -> Iterator[str]:
    """Path of the socket of a `samepage run` that waits."""
    report = folder / "service.json"
    show = "import os, sys; print(os.environ['SAMEPAGE_SOCKET'], flush=True); sys.stdin.read()"
    knobs = [part for knob in EAGER for part in ("--set", knob)]
    command = [sys.executable, "-m", "samepage", "run", "--json", str(report), *knobs, "--", sys.executable, "-c", show]
    with subprocess.Popen(command, env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdin is not None
        assert run.stdout is not None
        try:
            yield run.stdout.readline().strip()
        finally:
            run.stdin.close()
            run.wait(60)
        tally.merged += json.loads(report.read_text())["bytes_saved_peak"] // 4096


def _environment(**more: str) -> dict[str, str]:
    own = {k: v for k, v in os.environ.items() if not k.startswith("SAMEPAGE_") and k != "LD_PRELOAD"}
    return own | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | more


class Fuzzer:
    """Runs rounds in `folder`, with what is there to join under `sockets`."""

    def __init__(self, folder: Path, sockets: dict[str, str], tally: Tally, copies: int = 2) -> None:
        self._folder = folder
        self._sockets = {"nothing": "/nowhere"} | sockets
        self._tally = tally
        self._copies = copies
        self._program, self._agent = build(folder)

    def run(self, a: Round, only: Path | None = None) -> str:
        """What was found, or ""."""
        logs = self._folder / f"log.{os.getpid()}"
        command = [str(self._program), "--mode", a.mode, "--seed", str(a.seed), "--steps", str(a.steps)]
        command += ["--stealthy"] * a.stealthy + (["--only", str(only)] if only else [])
        compared = a.mode != "threads"
        try:
            if compared and (found := self._finish([self._start([*command, "--record", str(logs)])], a)):
                return f"without samepage!\n{found}"
            command += [
                "--lenient",
                *(["--compare", str(logs)] if compared else []),
                *["--naps"] * (a.under != "nothing"),
            ]
            loaded = {
                "LD_PRELOAD": str(self._agent),
                "SAMEPAGE_SOCKET": self._sockets[a.under],
                "SAMEPAGE_MIN_ALLOC": "65536",
            }
            return self._finish([self._start(command, **loaded) for _ in range(self._copies)], a)
        finally:
            self._tally.rounds += 1
            for log in self._folder.glob(f"{logs.name}.*"):
                log.unlink()

    def _start(self, command: list[str], **loaded: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            env=_environment(**loaded),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that children go with it
        )

    def _finish(self, processes: list[subprocess.Popen[str]], a: Round) -> str:
        found, deadline = "", time.monotonic() + PATIENCE
        for process in processes:
            try:
                said, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                found += f"it hangs:\n{stacks(process.pid)}"
                kill(process)
                said, _ = process.communicate()
            if process.returncode:
                found += f"status {process.returncode}\n{said}"
            else:
                self._count(said)
            kill(process)
        if found:
            self._tally.findings.append(f"{a}\n{found}")
        return found

    def _count(self, said: str) -> None:
        """Takes in what a run that found nothing says in its last line."""
        last = said.strip().rpartition("\n")[2]
        counts = {name: int(count) for name, count in re.findall(r"([\w-]+) (\d+)(?:, |$)", last)}
        self._tally.stricter += counts.pop("stricter", 0)
        self._tally.laxer += counts.pop("laxer", 0)
        self._tally.calls += sum(counts.values())


def kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def stacks(pid: int) -> str:
    """Where the threads of the process and its children are."""
    with contextlib.suppress(OSError):
        gdb = ["gdb", "-q", "-batch", "-p", str(pid), "-ex", "thread apply all bt 12"]
        return subprocess.run(gdb, capture_output=True, text=True, timeout=60).stdout
    return ""


def shrink(fuzzer: Fuzzer, a: Round, folder: Path) -> list[int]:
    """The fewest steps found with which the round still fails."""
    only = folder / "only"

    def fails(steps: Sequence[int]) -> bool:
        only.write_text("\n".join(map(str, steps)))
        return bool(fuzzer.run(a, only))

    return _fewest(list(range(a.steps)), fails)


def _fewest(steps: list[int], fails: Callable[[Sequence[int]], bool]) -> list[int]:
    """Leaves out parts, half of all at first, as long as it goes on failing."""
    part = max(1, len(steps) // 2)
    while True:
        at = 0
        while at < len(steps):
            without = steps[:at] + steps[at + part :]
            if fails(without):
                steps = without
                print(f"{len(steps)} steps", flush=True)
            else:
                at += part
        if part == 1:
            return steps
        part = max(1, part // 2)


def corpus() -> list[Round]:
    """The rounds that found something once."""
    rounds = []
    for line in CORPUS.read_text().splitlines():
        words = line.split("#")[0].split()
        if words:
            rounds.append(Round(words[0], int(words[1]), int(words[2]), words[3]))
    return rounds


def random_rounds(seed: int, modes: Sequence[str], under: Sequence[str]) -> Iterator[Round]:
    """Without end, each mode and each service in its turn."""
    turn = 0
    while True:
        mode = modes[turn % len(modes)]
        # Half of all under a storm, which finds most.
        which = under[0] if turn // len(modes) % 2 == 0 else under[turn // len(modes) // 2 % len(under)]
        yield Round(mode, seed + turn, MODES[mode], which)
        turn += 1


@contextlib.contextmanager
def fuzzer(tally: Tally, under: Sequence[str] = UNDER) -> Iterator[Fuzzer]:
    """One with the services it needs, which end with it."""
    with tempfile.TemporaryDirectory(prefix="samepage-fuzz-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        sockets = {}
        if "storm" in under:
            sockets["storm"] = stack.enter_context(storm(folder, tally))
        if "service" in under:
            sockets["service"] = stack.enter_context(service(folder, tally))
        yield Fuzzer(folder, sockets, tally)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, help="this one round")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--mode", choices=list(MODES))
    parser.add_argument("--under", choices=UNDER)
    parser.add_argument("--shrink", action="store_true", help="look for fewer steps with which it still fails")
    parser.add_argument("--keep-going", action="store_true", help="do not end after the first finding")
    args = parser.parse_args()
    tally = Tally()
    under = [args.under] if args.under else UNDER
    with fuzzer(tally, under) as it:
        ends = time.monotonic() + args.seconds
        seed = args.seed if args.seed is not None else random.SystemRandom().randrange(1 << 31)
        for a in random_rounds(seed, [args.mode] if args.mode else list(MODES), under):
            a = Round(a.mode, a.seed, args.steps or a.steps, a.under)
            found = it.run(a)
            if found:
                print(f"model: python -m tests.fuzz.model {a}\n{found}", file=sys.stderr, flush=True)
                if args.shrink:
                    print(*shrink(it, a, it._folder))
            if (found and not args.keep_going) or args.seed is not None or time.monotonic() >= ends:
                break
    print(f"model: {tally}")
    return 1 if tally.findings else 0


if __name__ == "__main__":
    sys.exit(main())
