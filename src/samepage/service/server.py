"""The service: accepts agents and control connections, and gives agents to ksmd as address spaces.

One thread accepts and watches for processes that go; one runs ksmd (`scanner`); every connection has a thread
of its own while it shakes hands or asks, so that nobody can hold up anybody else.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import select
import socket
import threading
from collections import Counter
from collections.abc import Callable

from samepage.memory import AddressSpaceGone, wire
from samepage.memory.agent import ENDED, TIMEOUT, AgentAddressSpace, Terms
from samepage.memory.identity import identify
from samepage.service import control
from samepage.service.scanner import Scanner, log
from samepage.service.sockets import Caller, peer

CONNECTIONS_MAX = 64
"""Connections of one user that shake hands or ask something at a time: more are turned away, for each has a thread."""


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8


def raise_descriptor_limit() -> None:
    """Let this process open as many descriptors as it may: one for each process, one for each segment."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def keep_freed_memory() -> None:
    """Have malloc keep what was freed, up to 32 MiB of it (mallopt(3)): ksmd's arrays come and go by the megabyte, and
    to get each of them from the kernel anew takes longer than to compute it."""
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in ((M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 32 << 20), (M_ARENA_MAX, 1)):
        mallopt(parameter, value)


def open_userfaultfd() -> int:
    """A descriptor of /dev/userfaultfd to pass to agents, who may not open it themselves; -1 when nor may this user."""
    try:
        return os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return -1


class Server:
    """Serves `listener`, which it takes over, until `stop`.

    Run by root, it serves everyone, each user in a merge domain of their own; else only who runs it.
    `before_leave` is called when a process went and is about to be dropped, with its counters still in.
    """

    def __init__(
        self,
        listener: socket.socket,
        scanner: Scanner,
        terms: Terms | None = None,
        before_leave: Callable[[], None] = lambda: None,
    ) -> None:
        self._listener = listener
        self._scanner = scanner
        self._terms = terms or Terms()
        self._before_leave = before_leave
        self.joined = 0
        """How many processes have joined so far."""
        self._owner = os.getuid()
        self._userfaultfd = open_userfaultfd()
        self._lock = threading.Lock()
        self._spaces: dict[int, AgentAddressSpace] = {}  # by file descriptor, which stays open as long as it is in here
        self._connections: Counter[int] = Counter()  # by user
        self._epoll = select.epoll()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)

    def run(self) -> None:
        """Accept, and watch for processes that go, until `stop`. Processes run on as they are, merged."""
        self._listener.setblocking(False)
        self._epoll.register(self._listener, select.EPOLLIN)
        self._epoll.register(self._wake_read, select.EPOLLIN)
        while True:
            events = self._epoll.poll()
            ready = {fd for fd, _ in events}
            if self._wake_read in ready:
                break
            # Those who went first: a process that executed another program is back at once, with the same pid.
            for fd in ready - {self._listener.fileno()}:
                self._leave(fd)
            if self._listener.fileno() in ready:
                self._accept()
        self._close()

    @property
    def wake_fd(self) -> int:
        """A byte written to this descriptor, which does not block, ends `run`."""
        return self._wake_write

    def stop(self) -> None:
        """End `run`; from any thread, or a signal handler."""
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"x")

    def _close(self) -> None:
        self._listener.close()
        with self._lock:
            spaces, self._spaces = list(self._spaces.values()), {}
        for space in spaces:
            space.hang_up("the service ends")
        self._epoll.close()
        os.close(self._wake_read)
        os.close(self._wake_write)
        if self._userfaultfd >= 0:
            os.close(self._userfaultfd)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as e:
            if e.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                log(f"cannot accept a connection: {e.strerror}")
                threading.Event().wait(0.1)  # the connection stays in the queue: without a pause this would spin
            return
        caller = peer(sock)
        with self._lock:
            welcome = self._connections[caller.uid] < CONNECTIONS_MAX
            self._connections[caller.uid] += welcome
        if not welcome:
            sock.close()
            return
        name = f"connection-{caller.pid}"
        threading.Thread(target=self._connection, args=(sock, caller), name=name, daemon=True).start()

    def _connection(self, sock: socket.socket, caller: Caller) -> None:
        """Who connected speaks first: an agent in binary, a client in JSON."""
        try:
            sock.settimeout(TIMEOUT)
            data, fd = wire.recv_bytes(sock)
            if fd >= 0:
                os.close(fd)
            if data.startswith(b"{"):
                with sock:
                    control.handle(sock, data, self._scanner, self._owner)
            else:
                self._join(sock, wire.decode(data), caller)
        except (AddressSpaceGone, wire.WireError) as e:
            if not isinstance(e.__cause__, ConnectionError):  # to end, or to exec, in the middle of it is no news
                log(e.strerror or str(e) if isinstance(e, OSError) else f"process {caller.pid} did not join: {e}")
            sock.close()
        except OSError:
            sock.close()  # it went, or was silent for long
        except Exception as e:
            log(f"connection of process {caller.pid} ended: {e!r}")
            sock.close()
        finally:
            with self._lock:
                self._connections[caller.uid] -= 1

    def _join(self, sock: socket.socket, hello: wire.Packet, caller: Caller) -> None:
        if self._owner not in (0, caller.uid):
            raise AddressSpaceGone(
                f"process {caller.pid} of user {caller.uid} may not join: not the user of this service"
            )
        if caller.pid == 0:
            raise AddressSpaceGone("a process of another pid namespace, which has no pid here, may not join")
        try:
            who = identify(caller.pid)
        except OSError as e:
            raise AddressSpaceGone(f"process {caller.pid} may not join: it cannot be seen who it is: {e}") from e
        if set(who.uids) != {caller.uid}:
            raise AddressSpaceGone(f"process {caller.pid} may not join: it is {caller.uid}, but its ids are {who.uids}")
        space = AgentAddressSpace.welcome(sock, hello, caller.pid, who.domain, self._terms, self._userfaultfd, who)
        with self._lock:
            before = [fd for fd, other in self._spaces.items() if other.pid == space.pid]
        for fd in before:  # one mm_slot a process: what it was before an exec is gone
            self._leave(fd)
        self._scanner.introduce(space.pid)
        with self._lock:
            self.joined += 1
            self._scanner.enter(space)
            self._spaces[space.fileno()] = space
            self._epoll.register(space.fileno(), select.EPOLLRDHUP)

    def _leave(self, fd: int) -> None:
        with self._lock:
            space = self._spaces.pop(fd, None)
        if space is None:
            return
        self._epoll.unregister(fd)
        space.hang_up(ENDED)
        if space.gone != ENDED:
            log(f"process {space.pid} ({space.comm}) is not served any more: {space.gone}")
        self._before_leave()
        self._scanner.exit(space)
        space.close()
