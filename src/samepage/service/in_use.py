"""The service that this process uses: an existing one, or one of its own inside the process."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from samepage import agent
from samepage.service import sockets

if TYPE_CHECKING:
    from samepage.service.scanner import Scanner

JOIN_TIMEOUT = 5.0
"""Seconds that joining may take before `merge` gives up."""


class Service(Protocol):
    """What the Python API asks of it."""

    def merge(self, vpn: int, npages: int) -> dict[str, Any]: ...
    def stats(self) -> dict[str, int]: ...


class Remote:
    """The service at `path`, of `samepage run` or a daemon. This process's agent joins it, now or when it comes."""

    def __init__(self, path: str) -> None:
        self._path = path
        agent.join(path)

    def merge(self, vpn: int, npages: int) -> dict[str, Any]:
        from samepage.service.control import Client

        with Client(self._path, timeout=None) as client:
            return client.ask("merge", vpn=vpn, npages=npages)

    def stats(self) -> dict[str, int]:
        from samepage.service.control import Client

        with Client(self._path) as client:
            counters: dict[str, int] = client.ask("stats")["counters"]
            return counters


class Local:
    """A ksmd in a thread of this process, for the pages of this process alone."""

    def __init__(self) -> None:
        from samepage.service.scanner import Scanner

        self._scanner = Scanner(concurrently=map)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            agent.attach(theirs.detach())
        except BaseException:
            ours.close()
            raise
        threading.Thread(target=_serve, args=(ours, self._scanner), name="ksmd", daemon=True).start()

    def merge(self, vpn: int, npages: int) -> dict[str, Any]:
        # In a thread, because a KeyboardInterrupt here would leave the agent's answer on the way.
        return _in_thread(lambda: self._scanner.merge(os.getpid(), vpn, npages))

    def stats(self) -> dict[str, int]:
        return self._scanner.counters()


def _serve(sock: socket.socket, scanner: Scanner) -> None:
    from samepage.memory import wire
    from samepage.memory.agent import AgentAddressSpace
    from samepage.memory.conversation import TIMEOUT
    from samepage.memory.handshake import Terms
    from samepage.process.merge_domain import MergeDomain
    from samepage.service.log import log

    try:
        sock.settimeout(TIMEOUT)
        hello = wire.recv(sock)
        scanner.enter(AgentAddressSpace.welcome(sock, hello, os.getpid(), MergeDomain(os.getuid()), Terms()))
    except (OSError, wire.WireError) as e:
        log(f"the agent of this process did not join: {e}")
        sock.close()
        return
    scanner.run()


def _in_thread(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    outcome: list[dict[str, Any] | BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as e:
            outcome.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


_service: Service | None = None
_choosing = threading.Lock()


def service() -> Service:
    """The service in use, which the first call chooses: `$SAMEPAGE_SOCKET`, else the daemon if it answers, else one
    inside this process."""
    global _service
    with _choosing:
        if _service is None:
            _service = _choose()
        return _service


def _choose() -> Service:
    path = os.environ.get("SAMEPAGE_SOCKET")
    if path:
        return Remote(path)
    path = sockets.running()
    return Remote(path) if path else Local()


def attach(path: str | None = None) -> None:
    """Join the service that listens at `path` (default: `$SAMEPAGE_SOCKET`, else the daemon that answers) from a
    program that was not started by `samepage run`.

    In this process, and in children that it forks, numpy arrays of 1 MiB and more that this thread makes from now on
    are merged, and so is what is registered; nothing else, for the agent cannot see what becomes of other memory. In
    programs that are executed from now on, so in the workers of multiprocessing's spawn and forkserver, of loky and
    of Ray, all is merged that `samepage run` would merge: the environment has the agent preloaded there. OSError:
    nothing was changed.
    """
    where = path or os.environ.get("SAMEPAGE_SOCKET") or sockets.running()
    if not where:
        raise OSError(errno.ENOENT, "no daemon answers: start `samepage daemon`, or say at which path one listens")
    library = agent.library_path()
    preload = agent.preload(library, os.environ.get("LD_PRELOAD", ""))
    _use(os.path.abspath(where))
    agent.serve(int(os.environ.get("SAMEPAGE_MIN_ALLOC") or agent.MIN_ALLOC))
    if not agent.preloaded():
        from samepage.agent.arrays import serve_arrays

        serve_arrays()
    os.environ |= {
        "LD_PRELOAD": preload,
        "SAMEPAGE_SOCKET": os.path.abspath(where),
        "SAMEPAGE_SECCOMP": str(agent.filters()),  # under which the agent was tried, or it had not joined
    }


def _use(path: str) -> None:
    """Have the service at `path` be the one in use. OSError with EBUSY if there is another one."""
    global _service
    with _choosing:
        if isinstance(_service, Local):
            raise OSError(
                errno.EBUSY, "this process merges its own memory already: attach before anything is registered"
            )
        _service = Remote(path)


def merge(vpn: int, npages: int) -> dict[str, Any]:
    """Merge `npages` pages of this process from `vpn` on now. Raises OSError: ENOTCONN if no service could be joined
    within `JOIN_TIMEOUT` seconds, ENOTSUP if there is no way to swap pages here.
    """
    chosen = service()
    deadline = time.monotonic() + JOIN_TIMEOUT
    while (mode := agent.mode()) is None:
        if time.monotonic() > deadline:
            raise OSError(errno.ENOTCONN, "no service joined yet: is `samepage daemon` running?")
        time.sleep(0.01)
    if mode == 0:
        raise OSError(errno.ENOTSUP, f"pages cannot be swapped here: {agent.mode_name(mode)}")
    while True:
        try:
            return chosen.merge(vpn, npages)
        except OSError as e:
            # The agent is ready a moment before the service has made its mm_slot.
            if e.errno != errno.ESRCH or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _after_fork_in_child() -> None:
    """Forget the parent's service: its ksmd thread does not exist here, and its sockets belong to the parent."""
    global _service, _choosing
    _service = None
    _choosing = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)
