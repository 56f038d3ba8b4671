"""`samepage run`."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from samepage import agent
from samepage.commands import RESERVE, CommandError, add_mount, add_reserve, add_swap, child, engines, size
from samepage.commands.progress import processes, progress, saved, shared
from samepage.commands.streams import say
from samepage.doctor.facts import Facts, look
from samepage.doctor.findings import forbidden, hindrance, not_swapped, too_old
from samepage.service import sockets
from samepage.service.machine import LOOK_EVERY, MachineDaemon
from samepage.service.private import PrivateService

MIB = 1 << 20

NOBODY_JOINED = (
    "nothing was saved: no process joined, for none had memory to merge, or the command ended at once, "
    "is statically linked, or is setuid"
)

MEMORY = "all"
"""What of a program's memory is taken unless --memory says otherwise ($SAMEPAGE_MEMORY, agent/hooks/wrappers.c)."""


class Run:
    """Run a command, and merge the pages of it and all its children.

    Where this user or root runs a daemon it is joined, else the command has a ksmd of its own; so it has with --set,
    --reserve, --swap, --mount and --sysfs, for the settings of a daemon are not the command's to change.

    The exit status is the command's; 128 and the signal's number when a signal ended it. One line on stderr says at
    the end what was saved.
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--json",
            metavar="FILE",
            type=Path,
            help="write counters, peak and a row for every process to FILE, every second and at the end",
        )
        parser.add_argument(
            "--set",
            metavar="KNOB=VALUE",
            type=_knob,
            action="append",
            default=[],
            help="set a knob before the first scan",
        )
        parser.add_argument(
            "--engine",
            choices=("user", "kernel", "auto"),
            default="user",
            help="who merges: samepage's agent (default), or the kernel's own ksmd, also statically linked programs "
            "(KNOBs are then those of /sys/kernel/mm/ksm, which are put back at the end); auto: the kernel's for those "
            "processes alone that the agent cannot be in",
        )
        parser.add_argument(
            "--memory",
            choices=("large", "mapped", "all"),
            help="what is merged: large allocations; what the program maps itself, too; or allocations from 64K on "
            f"and libc's heap besides (default: {MEMORY})",
        )
        parser.add_argument(
            "--min-alloc",
            metavar="SIZE",
            type=size,
            help="allocations of at least this size are merged: bytes, or with K, M or G "
            "(default: 64K; 1M with --memory large or mapped)",
        )
        parser.add_argument(
            "--domain",
            metavar="NAME",
            type=_domain,
            help="have a daemon keep what is merged in merge domain NAME, apart from other processes of this user; one "
            "that its policy opens to others, too, only if the policy lets this user in",
        )
        add_reserve(parser)
        add_swap(parser)
        parser.set_defaults(reserve=None)
        parser.add_argument(
            "--progress", action="store_true", help="say on the terminal now and then what is saved, while it runs"
        )
        engines.add_terms(parser)
        add_mount(parser)
        parser.add_argument(
            "--sysfs",
            action="store_true",
            help="let COMMAND, and no other, find these files at /sys/kernel/mm/ksm, in a mount namespace of its own",
        )
        parser.add_argument("command_line", metavar="COMMAND", nargs=argparse.REMAINDER, help="what to run")
        self._parser = parser

    def run(self, args: argparse.Namespace) -> int:
        command: list[str] = args.command_line
        if command[:1] == ["--"]:
            command = command[1:]
        if not command:
            self._parser.error("COMMAND is missing")
        report = _writable(args.json) if args.json else None
        facts = look()
        if engines.by_the_kernel_alone(args.engine, facts):
            return self._by_the_kernel(args, facts, report, command)
        library = _preloadable(agent.library_path())
        program = child.locate(command[0])
        if why := forbidden(facts):
            say(why)
            return child.wait(child.start(program, command, dict(os.environ)))
        path = sockets.running()
        own = [option for option in ("set", "reserve", "swap", "mount", "sysfs") if getattr(args, option)]
        if path and not own:
            return self._under_the_daemon(args, facts, report, path, library, program, command)
        if path:
            say(f"the daemon at {path} is not joined: --{own[0]} is for a ksmd of the command's own")
        if old := too_old(facts):
            raise CommandError(old)
        if why := hindrance(facts, args.swap or "move"):
            say(why)
        return self._privately(args, facts, report, library, program, command)

    def _by_the_kernel(self, args: argparse.Namespace, facts: Facts, report: Path | None, command: list[str]) -> int:
        """Run the command with all its memory mergeable by the kernel's ksmd."""
        from samepage.kernel.attach import merge_all_of_this

        options = ("domain", "memory", "min_alloc", "reserve", "swap", "mount", "sysfs")
        if own := [option for option in options if getattr(args, option)]:
            self._parser.error(f"--{own[0].replace('_', '-')} is for --engine user")
        if facts.version < (6, 7):
            raise CommandError("--engine kernel needs Linux 6.7: before, a program that is executed is not mergeable")
        program = child.locate(command[0])
        kernel = engines.ByTheKernel(report, args.set, terms=engines.terms(args))
        try:
            pid = child.start(program, command, os.environ | kernel.environment, merge_all_of_this)
            kernel.started(pid)
            look = progress(args.progress, lambda: shared(*kernel.now()))
            status = child.wait(pid, _both(kernel.look, look), LOOK_EVERY)
        finally:
            summary = kernel.finish()
        _tell_of_shared(summary)
        return status

    def _under_the_daemon(
        self,
        args: argparse.Namespace,
        facts: Facts,
        report: Path | None,
        path: str,
        library: Path,
        program: str,
        command: list[str],
    ) -> int:
        """Run the command with its processes joining the daemon at `path`."""
        say(f"joined the daemon at {path}")
        daemon, beside = MachineDaemon(path, report), engines.beside(args, daemon=True)
        environment = _environment(library, path, args, facts) | dict([daemon.variable]) | beside.environment
        # Before UFFDIO_MOVE a daemon swaps by write-protection, if at all.
        enter = None if facts.move else agent.forbid_huge_pages
        try:
            pid = child.start(program, command, environment, enter)
            beside.started(pid)
            look = progress(args.progress, lambda: shared(*daemon.now()))
            status = child.wait(pid, _both(daemon.look, beside.look, look), LOOK_EVERY)
        finally:
            adopted = beside.finish()
        say(_shared(daemon.finish()))
        _tell_of_shared(adopted, "the kernel: ")
        return status

    def _privately(
        self,
        args: argparse.Namespace,
        facts: Facts,
        report: Path | None,
        library: Path,
        program: str,
        command: list[str],
    ) -> int:
        """Run the command under a ksmd of its own."""
        reserve, beside = args.reserve or RESERVE, engines.beside(args, daemon=False)
        service = PrivateService(args.set, report, reserve, args.swap == "wp", lambda: beside.others(reserve))
        environment = _environment(library, service.path, args, facts) | beside.environment
        status = None
        try:
            with _tree(args.mount, args.sysfs, service) as enter:
                forbid = agent.forbid_huge_pages if args.swap == "wp" else None
                pid = child.start(program, command, environment, _both(forbid, enter))
                beside.started(pid)
                look = progress(args.progress, lambda: saved(service.path))
                status = child.wait(pid, _both(beside.look, look), LOOK_EVERY)
        except OSError as e:
            if status is None:
                raise
            say(f"{e.strerror or e}")  # something of ours did not end as it should: the command did
        finally:
            summary = service.finish()
            adopted = beside.finish()
        say(_saved(summary))
        _tell_of_shared(adopted, "the kernel: ")
        return status


def _both(*steps: Callable[[], None] | None) -> Callable[[], None] | None:
    """Those that there are, one after the other."""
    found = list(filter(None, steps))

    def do() -> None:
        for step in found:
            step()

    return do if found else None


@contextlib.contextmanager
def _tree(directory: str | None, sysfs: bool, service: PrivateService) -> Iterator[Callable[[], None] | None]:
    """KSM's files while the command runs, if they are asked for; yields what the command has to enter to see them."""
    if directory is None and not sysfs:
        yield None
        return
    from samepage.sysfs.mount import Mount
    from samepage.sysfs.namespace import Namespace

    with contextlib.ExitStack() as ending:
        tree = Mount(directory, service.path, service.pid)
        ending.callback(tree.end)
        if not sysfs:
            yield None
            return
        namespace = Namespace(tree.directory, service.path)
        ending.callback(namespace.end)
        yield namespace.enter


def _domain(text: str) -> str:
    if not re.fullmatch(sockets.DOMAIN_NAME, text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a name: at most 31 letters, digits, `_`, `.` and `-`, with a letter first"
        )
    return text


def _knob(text: str) -> tuple[str, str]:
    knob, equals, value = text.partition("=")
    if not knob or not equals or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not KNOB=VALUE")
    return knob, value


def _writable(file: Path) -> Path:
    """Where FILE really is. It is replaced as a whole, so what counts is whether its directory can be written."""
    try:
        path = Path(os.path.realpath(file))
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            raise CommandError(f"cannot write {file}: not a regular file")
        probe = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as e:
        raise CommandError(f"cannot write {file}: {e.strerror}") from e
    return path


def _preloadable(library: Path) -> Path:
    if not library.exists():
        raise CommandError(f"the agent is missing: {library}")
    agent.preload(library, "")  # says so if it cannot be
    return library


def _environment(library: Path, socket: str, args: argparse.Namespace, facts: Facts) -> dict[str, str]:
    environment = dict(os.environ)
    environment["LD_PRELOAD"] = agent.preload(library, environment.get("LD_PRELOAD", ""))
    environment["SAMEPAGE_SOCKET"] = socket
    environment["SAMEPAGE_MEMORY"] = args.memory or MEMORY
    environment["SAMEPAGE_SECCOMP"] = str(facts.seccomp)  # under so many filters it was tried (agent/hooks/seccomp.c)
    if args.domain is not None:
        environment["SAMEPAGE_DOMAIN"] = args.domain
    if args.min_alloc is not None:
        environment["SAMEPAGE_MIN_ALLOC"] = str(args.min_alloc)
    return environment


def _tell_of_shared(summary: dict[str, Any] | None, of: str = "") -> None:
    if summary is not None:
        say(f"{of}{_shared(summary)}")


def _shared(summary: dict[str, Any]) -> str:
    """What processes of the command shared under a daemon, in plain words."""
    joined = summary["processes_joined"]
    if not joined and "engine" in summary:
        return "nothing was shared: the command ended at once"
    if not joined:
        return NOBODY_JOINED
    if not summary["bytes_shared_peak"] and (why := not_swapped(summary.get("swap", ()))):
        return f"nothing was shared: {why}"
    last, peak = summary["bytes_shared"] / MIB, summary["bytes_shared_peak"] / MIB
    return (
        f"shared {peak:.1f} MiB at most and {last:.1f} MiB last, with each other or with others, in {processes(joined)}"
    )


def _saved(summary: dict[str, Any] | None) -> str:
    """What was saved, in plain words."""
    if summary is None:
        return "the service ended before the command did; what was saved is not known"
    joined = summary["processes_joined"]
    if not joined:
        return NOBODY_JOINED
    if not summary["bytes_saved_peak"] and (why := not_swapped(summary["swap"])):
        return f"nothing was saved: {why}"
    if not summary["bytes_saved_peak"] and summary["merge_failures"].get("NOMEM"):
        return (
            "nothing was saved: the machine or a memory cgroup has not enough memory left for the copies, or "
            f"{agent.UNSEEN}"
        )
    last, peak = summary["bytes_saved"] / MIB, summary["bytes_saved_peak"] / MIB
    return f"saved {peak:.1f} MiB at most and {last:.1f} MiB last, in {processes(joined)}"
