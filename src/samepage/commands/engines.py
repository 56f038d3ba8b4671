"""Which engine merges: the one place that chooses. docs/engines.md says which does what.

What follows from the choice has the same shape whatever it was: `beside` for `samepage run`, `others` for a service,
`chosen` for commands that show and set.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from samepage.commands import RESERVE, CommandError, add_reserve
from samepage.commands.streams import say
from samepage.doctor.facts import Facts
from samepage.doctor.findings import way_to_swap
from samepage.service import sockets
from samepage.service.engine import Answer, Cancelled, Progress

if TYPE_CHECKING:
    from samepage.kernel.adopt import Adopter
    from samepage.kernel.pace import Terms
    from samepage.service.control import Client
    from samepage.service.engine import Engine

MIB = 1 << 20
REFUSED_MAX = 5
"""Processes that were left alone that are named at the end."""


# ---- samepage run ----------------------------------------------------------------------------------------------------


def by_the_kernel_alone(engine: str, facts: Facts) -> bool:
    """Whether nothing is to be preloaded: for that was said, or agents could not swap pages here."""
    if engine == "auto" and way_to_swap(facts, "move") != "move":
        from samepage.kernel.settings import Settings

        return facts.version >= (6, 7) and Settings().usable()
    return engine == "kernel"


class Beside:
    """What of a command the kernel merges: nothing."""

    environment: dict[str, str]
    look: Callable[[], None] | None = None
    """To be called every `LOOK_EVERY` seconds."""

    def __init__(self) -> None:
        self.environment = {}

    def others(self, reserve: int) -> Sequence[Engine]:
        """The engines that a service of the command's own has besides; called in its process, a child of this one."""
        return ()

    def started(self, pid: int) -> None:
        """The command runs."""

    def finish(self) -> dict[str, Any] | None:
        """It has ended. What was shared, if anything can have been."""
        return None


class ByTheKernel(Beside):
    """The kernel's ksmd runs as long as the command does. `knobs` are set besides; without any it is paced, unless a
    daemon does that. `CommandError`: it cannot be had."""

    def __init__(
        self,
        report: Path | None = None,
        knobs: Sequence[tuple[str, str]] = (),
        paced: bool = True,
        terms: Terms | None = None,
    ) -> None:
        from samepage.kernel.pace import Pace, Terms
        from samepage.kernel.processes import KernelProcesses
        from samepage.kernel.settings import Settings, SettingsError

        self._settings, self._held, pace = Settings(), [os.getpid()], None
        terms = terms or Terms()
        try:
            self._settings.hold(self._held, {**terms.at_once, **dict(knobs)})
            pace = Pace(self._settings, terms, tell=say) if paced and not knobs else None
        except SettingsError as e:
            if knobs or not self._settings.running():
                raise CommandError(f"nothing would be merged: {e}") from e
        self._processes = KernelProcesses(report, pace)
        self.environment = dict([self._processes.variable])
        self.look = self._processes.look

    def now(self) -> tuple[int, int]:
        """Bytes shared by processes of the command, and how many there are."""
        return self._processes.now()

    def started(self, pid: int) -> None:
        from samepage.kernel.settings import SettingsError

        self._held.append(pid)
        with contextlib.suppress(SettingsError):  # it goes on when this process is killed
            self._settings.hold([pid], {})

    def finish(self) -> dict[str, Any] | None:
        self._settings.release(self._held)
        return self._processes.finish()


class Adopting(ByTheKernel):
    """The same for those processes of the command that have no agent."""

    def __init__(self, paced: bool, terms: Terms) -> None:
        super().__init__(paced=paced, terms=terms)
        self.environment["SAMEPAGE_ENGINE"] = "auto"
        self._adopter: Adopter | None = None

    def others(self, reserve: int) -> Sequence[Engine]:
        from samepage.kernel.engine import KernelEngine
        from samepage.service.machine import is_marked

        variable, parent = self._processes.variable, os.getppid()
        return [KernelEngine(reserve, self._settings, lambda pid: is_marked(pid, variable, parent))]

    def started(self, pid: int) -> None:
        from samepage.kernel.adopt import Adopter

        super().started(pid)
        self._adopter = Adopter(self._settings, self._processes.variable)
        self._adopter.start()

    def finish(self) -> dict[str, Any] | None:
        if self._adopter is None:
            super().finish()
            return None
        self._adopter.finish()
        self._held += self._adopter.attached
        for why in list(self._adopter.refused.values())[:REFUSED_MAX]:
            say(why)
        summary = super().finish()
        return summary if self._adopter.attached else None


def beside(args: argparse.Namespace, daemon: bool) -> Beside:
    """For a command that is run under the agent; `daemon`: under one, which sets the pace if it has the engine."""
    if args.engine != "auto":
        return Beside()
    try:
        return Adopting(not daemon, terms(args))
    except CommandError as e:
        say(f"programs that the agent cannot be in are not merged: {e}")
        return Beside()


# ---- both ------------------------------------------------------------------------------------------------------------


def add_terms(parser: argparse.ArgumentParser) -> None:
    """The options that say what is asked of ksmd."""
    parser.add_argument(
        "--ksmd-cpu",
        metavar="PERCENT",
        type=_percent,
        default=5.0,
        help="of a CPU: what the kernel's ksmd may take while there is no new memory (default: 5)",
    )
    parser.add_argument(
        "--ksmd-when-short",
        metavar="PERCENT",
        type=_percent,
        help="have the kernel's ksmd run only while less than that of the memory is available, or processes wait for "
        "memory (PSI)",
    )
    parser.add_argument(
        "--ksmd-stop-at-loss",
        action="store_true",
        help="have the kernel's ksmd rest when merging costs more than it saves (general_profit), until there is new "
        "memory; else that is only told",
    )


def _percent(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no percentage")
    return value


def terms(args: argparse.Namespace) -> Terms:
    """By these options."""
    from samepage.kernel.pace import Terms

    return Terms(args.ksmd_cpu, args.ksmd_when_short, args.ksmd_stop_at_loss)


# ---- services --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def others(args: argparse.Namespace) -> Iterator[Sequence[Engine]]:
    """The engines that a daemon has besides its agents', at work meanwhile. `CommandError`: one cannot be had."""
    if args.engine != "auto":
        yield ()
        return
    from samepage.kernel.engine import KernelEngine
    from samepage.kernel.settings import Settings, SettingsError

    settings = Settings()
    kernel = KernelEngine(args.reserve, settings, terms=terms(args))
    try:
        kernel.start()
    except SettingsError as e:
        raise CommandError(str(e)) from e
    try:
        yield [kernel]
    finally:
        kernel.stop()


# ---- samepage get, set, unmerge --------------------------------------------------------------------------------------


class Asked(Protocol):
    """What `samepage get`, `set` and `unmerge` ask."""

    def knobs(self) -> dict[str, str]: ...
    def get(self, knob: str) -> str: ...
    def set(self, knob: str, value: str, cancelled: Cancelled) -> None: ...
    def unmerge(self, pids: list[int], progress: Progress, cancelled: Cancelled) -> Answer: ...


class Service:
    """The service, over its control connection."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def knobs(self) -> dict[str, str]:
        return dict(self.client.ask("get")["knobs"])

    def get(self, knob: str) -> str:
        return str(self.client.ask("get", knob=knob)["knobs"][knob])

    def set(self, knob: str, value: str, cancelled: Cancelled) -> None:
        self.client.ask("set", knob=knob, value=value)

    def unmerge(self, pids: list[int], progress: Progress, cancelled: Cancelled) -> Answer:
        """Ctrl-C cancels it, and the final packet then says how far it came."""
        before = signal.signal(signal.SIGINT, lambda *_: self.client.cancel())
        try:
            for packet in self.client.stream("unmerge", pids=pids):
                last = packet
            return last
        finally:
            signal.signal(signal.SIGINT, before)


def add_engine(parser: argparse.ArgumentParser, what: str) -> None:
    """The options by which these commands say what they ask."""
    parser.add_argument(
        "--engine", choices=("user", "kernel"), default="user", help=f"{what}; kernel: of the kernel's own KSM, as root"
    )
    add_reserve(parser)
    parser.set_defaults(reserve=None)


@contextlib.contextmanager
def chosen(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Iterator[Asked]:
    """By --engine, --socket and --reserve."""
    if args.engine == "kernel":
        from samepage.kernel.engine import KernelEngine

        yield KernelEngine(args.reserve or RESERVE)
        return
    from samepage.service.control import Client

    if args.reserve is not None:
        parser.error("--reserve is the service's, or for --engine kernel")
    with Client(sockets.find(args.socket), timeout=None) as client:
        yield Service(client)
