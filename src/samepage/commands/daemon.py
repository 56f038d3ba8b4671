"""`samepage daemon`."""

from __future__ import annotations

import argparse
import contextlib
import grp
import importlib.util
import os
import signal
import socket
import stat
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samepage.commands import CommandError, add_mount, add_reserve, add_swap, engines, streams
from samepage.doctor.facts import look
from samepage.doctor.findings import hindrance, too_old
from samepage.service import sockets, systemd

if TYPE_CHECKING:
    from samepage.service.engine import Engine
    from samepage.service.scanner import Scanner

METRICS = "127.0.0.1:19453"
"""Where metrics are served unless an address says otherwise. The kernel gives out no port so low by itself."""


class Daemon:
    """Merge the pages of all processes that join, until SIGTERM or SIGINT.

    Run by root it serves every user, each in a merge domain of their own; run by anyone else, that user alone. A policy
    says otherwise (`samepage policy check`); SIGHUP has it read again. When the daemon ends, processes run on as they
    are, merged. Started by systemd for a socket unit it serves that socket.
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--socket", metavar="PATH", help=f"where to listen (default: {sockets.default_path()})")
        parser.add_argument(
            "--userfaultfd-group",
            metavar="GROUP",
            type=_group,
            help="hand /dev/userfaultfd to processes of this group alone (default: to all that join)",
        )
        parser.add_argument(
            "--engine",
            choices=("user", "auto"),
            default="user",
            help="auto: have the kernel's ksmd run as well, for processes that the agent cannot be in "
            "(`samepage attach`, `samepage run --engine auto`), and show these, too",
        )
        engines.add_terms(parser)
        parser.add_argument(
            "--policy",
            metavar="FILE",
            help="which processes may share with which, and which are left alone (default: for root "
            f"{sockets.POLICY_PATH}, if it is there)",
        )
        add_reserve(parser)
        add_swap(parser)
        add_mount(parser)
        parser.add_argument(
            "--metrics",
            metavar="ADDRESS",
            nargs="?",
            const=METRICS,
            help="serve metrics in Prometheus' format at HOST:PORT, or at the path of a Unix socket, for this user "
            f"alone (without ADDRESS: {METRICS}); whoever can connect can read them, of all users",
        )

    def run(self, args: argparse.Namespace) -> int:
        facts = look()
        if old := too_old(facts):
            raise CommandError(old)
        policy = _policy(args.policy or sockets.policy_path())  # before anything is made
        given = systemd.listener()
        path = given.getsockname() if given else args.socket or sockets.default_path()
        if args.socket is None and not given:
            _private_parent(Path(path).parent)
        listener = given or sockets.listen(path, everybody=os.getuid() == 0)
        try:
            with engines.others(args) as others, _tree(args.mount, path):
                if why := hindrance(facts, args.swap or "move"):
                    streams.say(why)
                options = {"userfaultfd_group": args.userfaultfd_group, "others": others} | policy
                with _metrics(args.metrics) as metrics:
                    _serve(listener, path, args.reserve, args.swap == "wp", metrics, **options)
        finally:
            if not given:  # else systemd listens on
                Path(path).unlink(missing_ok=True)
        return 0


@contextlib.contextmanager
def _tree(directory: str | None, socket: str) -> Iterator[None]:
    """KSM's files while the daemon runs, if they are asked for."""
    if directory is None:
        yield
        return
    from samepage.sysfs.mount import Mount

    tree = Mount(directory, socket, os.getpid())
    try:
        yield
    finally:
        tree.end()


@contextlib.contextmanager
def _metrics(address: str | None) -> Iterator[socket.socket | None]:
    """Where metrics are to be served, if they are asked for."""
    if address is None:
        yield None
        return
    if importlib.util.find_spec("prometheus_client") is None:
        raise CommandError("--metrics needs the Python package prometheus_client: pip install 'samepage[metrics]'")
    from samepage.service import exposition

    listener = exposition.listen(address)
    try:
        yield listener
    finally:
        exposition.remove(address)


def _policy(path: str | None) -> dict[str, Any]:
    """What the server is to know of it."""
    if path is None:
        return {}
    from samepage.service.policy import load

    return {"policy": load(path), "policy_file": path}


def _group(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise argparse.ArgumentTypeError(f"there is no group {name!r}") from None


def _serve(
    listener: socket.socket,
    path: str,
    reserve: int,
    write_protect: bool = False,
    metrics: socket.socket | None = None,
    **server_options: Any,
) -> None:
    # Imported once the socket is ours: numpy takes longer to load than to refuse.
    from samepage.memory.handshake import Terms
    from samepage.memory.wire import Flags
    from samepage.service.descriptors import raise_descriptor_limit
    from samepage.service.scanner import Scanner
    from samepage.service.server import Server, keep_freed_memory

    raise_descriptor_limit()
    keep_freed_memory()
    scanner = Scanner()
    terms = Terms(reserve=reserve, flags=Flags.SWAP_WP if write_protect else 0)
    server = Server(listener, scanner, terms, **server_options)
    # Python writes a byte there for every signal that it handles, and that ends the server. A handler would not do: it
    # runs when this thread wakes, and a signal that comes between two polls does not wake it.
    signal.set_wakeup_fd(server.wake_fd)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    if os.getuid() == 0 or server_options.get("policy") is not None:
        signal.signal(signal.SIGHUP, lambda *_: None)  # the server reads it again
    threading.Thread(target=scanner.run, name="ksmd", daemon=True).start()
    if metrics is not None:
        _expose(metrics, scanner, server_options.get("others", ()))
    with contextlib.suppress(OSError):  # the processes it is for do not read that
        print(f"samepage: listening at {path}")
    streams.flush()
    systemd.ready()
    server.run()
    signal.set_wakeup_fd(-1)
    scanner.stop()


def _expose(listener: socket.socket, scanner: Scanner, others: Sequence[Engine]) -> None:
    from prometheus_client.exposition import generate_latest

    from samepage.service.exposition import Exposition
    from samepage.service.metrics import Metrics

    metrics = Metrics(scanner, others)
    Exposition(listener, lambda: generate_latest(metrics))


def _private_parent(folder: Path) -> None:
    """Make the directory of the default socket where nobody else did; /tmp is everyone's."""
    if str(folder).startswith("/tmp/"):
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise CommandError(f"{folder} is not a directory of this user alone: name a place with --socket")
