"""The service: accepts agents and control connections, and gives agents to ksmd as address spaces.

One thread accepts connections, and watches for processes that end and for connections that send something. A few other
threads (`workers`) do what these ask for, so that nobody can hold up anybody else, and a silent connection has no
thread. One more thread runs ksmd (`scanner`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from samepage.memory import AddressSpaceGone, wire
from samepage.memory.agent import AgentAddressSpace
from samepage.memory.conversation import ENDED, TIMEOUT
from samepage.memory.handshake import Terms, asked_domain, greet
from samepage.process.identity import Identity, identify_peer
from samepage.process.merge_domain import MergeDomain
from samepage.service import control
from samepage.service.cgroups import NOWHERE, group_of
from samepage.service.closing import close_all, close_one
from samepage.service.descriptors import shares
from samepage.service.engine import Engine, Engines
from samepage.service.log import log, log_once, log_the_rest
from samepage.service.policy import Place, Policy, PolicyError, load
from samepage.service.scanner import Scanner
from samepage.service.sockets import Caller, anybody, groups, peer, policy_path
from samepage.service.workers import Workers

CONNECTIONS_MAX = 256
"""The most connections of one user that shake hands or ask something at a time; more are turned away."""

ACCEPT_AT_ONCE = 64

HURRY = 0.5
"""After so many seconds nobody waits any longer for an answer of a process that is not the owner's. The process has its
turn when it has answered; after `TIMEOUT` it is dropped, as any other."""

DOUBTFUL_MAX = 8
"""How many descriptors that are no memfds a user's processes may send before the user is served no more: each may cost
a thread and a descriptor for ever."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8


def keep_freed_memory() -> None:
    """Make malloc keep up to 32 MiB of freed memory (mallopt(3)): ksmd's arrays come and go by the megabyte, and
    getting each from the kernel anew takes longer than computing it."""
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in ((M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 32 << 20), (M_ARENA_MAX, 1)):
        mallopt(parameter, value)


def open_userfaultfd() -> int:
    """A descriptor of /dev/userfaultfd to pass to agents, which may not be allowed to open it; -1 if this user may not
    either."""
    try:
        return os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return -1


@dataclass(slots=True, eq=False)
class _Connection:
    """A peer that connected and has not joined. `who` and `comm` are set once it was greeted as an agent."""

    sock: socket.socket
    caller: Caller
    fd: int
    ends: float
    """When the service hangs up on them, in `time.monotonic`."""
    heard: bool = False
    """They sent something, and are being served."""
    who: Identity | None = None
    comm: str = ""
    asked: str = ""
    """The merge domain that they ask for; "": none."""
    groups: frozenset[int] = frozenset()
    domain: MergeDomain | None = None
    """Where they belong, once they were greeted."""


class Server:
    """Serves `listener`, which it takes over, until `stop`. Run by root, it serves everyone, each user in a merge
    domain of their own; otherwise only the user who runs it. `before_leave` is called when a process has ended and is
    about to be dropped, with its counters still included. `userfaultfd_group`: only processes of that group, and the
    owner's, get /dev/userfaultfd; None: all do. `others`: further engines, for processes that do not join. `policy`
    says who is in which merge domain. At SIGHUP `policy_file` is read, or this user's default policy.
    """

    def __init__(
        self,
        listener: socket.socket,
        scanner: Scanner,
        terms: Terms | None = None,
        before_leave: Callable[[], None] = lambda: None,
        userfaultfd_group: int | None = None,
        others: Sequence[Engine] = (),
        policy: Policy | None = None,
        policy_file: str | None = None,
    ) -> None:
        self._policy = policy or Policy()
        self._policy_file = policy_file
        self._listener = listener
        self._scanner = scanner
        self._engines = Engines(scanner, others)
        self._terms = terms or Terms()
        self._before_leave = before_leave
        self.joined = 0
        """How many processes have joined so far."""
        self._owner = os.getuid()
        self._anybody = anybody()
        self._userfaultfd = open_userfaultfd()
        self._userfaultfd_group = userfaultfd_group
        self._shares = shares()
        scanner.limit_segments(self._shares.segments)
        self._lock = threading.Lock()
        # By file descriptor, which stays open as long as it is in here:
        self._spaces: dict[int, AgentAddressSpace] = {}
        self._connections: dict[int, _Connection] = {}
        self._processes: Counter[int] = Counter()  # that joined or were greeted, by user
        self._connected: Counter[int] = Counter()  # connections, by user
        self._doubtful: Counter[int] = Counter()  # descriptors, by user
        self._workers = Workers(
            lambda e: log_once("a mistake of the service's own", f"a connection ended: {e!r}"), self._owner
        )
        self._epoll = select.epoll()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._turned_away: list[socket.socket] = []
        self._looked = 0.0  # for connections that were silent for too long
        self._spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

    def run(self) -> None:
        """Accept connections, and watch for processes that end, until `stop`. Processes run on as they are, merged."""
        self._listener.setblocking(False)
        self._epoll.register(self._listener, select.EPOLLIN)
        self._epoll.register(self._wake_read, select.EPOLLIN)
        while True:
            ready = [fd for fd, _ in self._epoll.poll(1.0 if self._connections else None)]
            if self._wake_read in ready and self._is_over():
                break
            try:
                self._serve(ready)
            except Exception as e:  # nobody who connects may end this
                log_once("a mistake of the service's own", f"the service: {e!r}")
        self._close()

    def _is_over(self) -> bool:
        """Whether to end: somebody wrote to `wake_fd`, the number of a signal (`signal.set_wakeup_fd`) or `stop`."""
        if set(os.read(self._wake_read, 4096)) != {signal.SIGHUP}:
            return True
        if path := self._policy_file or policy_path():
            try:
                self._policy = load(path)
                self._scanner.look_again()
            except PolicyError as e:
                log(f"the policy stays as it was: {e.strerror}")
        return False

    def _serve(self, ready: list[int]) -> None:
        # First those that ended: a process that executed another program is back at once, with the same pid.
        for fd in ready:
            if fd in self._spaces:
                self._leave(fd)
        for fd in ready:
            if connection := self._connections.get(fd):
                connection.heard = True
                self._workers.submit(connection.caller.uid, partial(self._attend, connection))
        if self._listener.fileno() in ready:
            for _ in range(ACCEPT_AT_ONCE):
                if not self._accept():
                    break
            if self._turned_away:
                self._turned_away = close_all(self._turned_away)
        now = time.monotonic()
        if now - self._looked >= 0.25:
            self._looked = now
            self._end_the_silent(now)

    def _end_the_silent(self, now: float) -> None:
        with self._lock:
            silent = [c for c in self._connections.values() if not c.heard and c.ends < now]
        for connection in silent:
            connection.heard = True
            self._epoll.unregister(connection.fd)
            self._workers.submit(connection.caller.uid, partial(self._end, connection))

    @property
    def wake_fd(self) -> int:
        """A byte written to this descriptor, which does not block, ends `run`; the number of SIGHUP makes it read the
        policy."""
        return self._wake_write

    def stop(self) -> None:
        """End `run`; from any thread, or a signal handler."""
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"x")

    def _close(self) -> None:
        self._listener.close()
        with self._lock:
            spaces, self._spaces = list(self._spaces.values()), {}
            connections, self._connections = list(self._connections.values()), {}
        for space in spaces:
            space.hang_up("the service ends")
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)
        self._workers.end()
        self._epoll.close()
        for fd in (self._wake_read, self._wake_write, self._spare):
            os.close(fd)
        if self._userfaultfd >= 0:
            os.close(self._userfaultfd)
        log_the_rest()

    # -- connections ------------------------------------------------------------------------------------

    def _accept(self) -> bool:
        """Whether there was somebody."""
        try:
            sock, _ = self._listener.accept()
        except OSError as e:
            if e.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                log_once("no descriptor for a connection", f"cannot accept a connection: {e.strerror}")
                self._turn_away()
            return False
        caller = peer(sock)
        if caller.uid == self._anybody:  # its user is unknown, and so is the owner of its pages
            log_once("users without an id", "processes of users that have no id in this user namespace may not join")
            self._scanner.tally.refuse("no user id")
            self._turned_away.append(sock)
            return True
        connection = _Connection(sock, caller, sock.fileno(), time.monotonic() + TIMEOUT)
        with self._lock:
            welcome = self._connected[caller.uid] < CONNECTIONS_MAX
            welcome &= self._has_room(self._connected, caller.uid, self._shares.connections)
            if welcome:
                self._connected[caller.uid] += 1
                self._connections[connection.fd] = connection
        if welcome and self._listen_to(connection):
            return True
        self._turned_away.append(sock)
        if welcome:
            self._forget(connection)
            self._connected_less(caller.uid)
        self._scanner.tally.refuse("too many connections")
        log_once("a connection turned away", f"too many connections: one of user {caller.uid} is turned away")
        return True

    def _listen_to(self, connection: _Connection) -> bool:
        """Watch a connection. False: this user may watch no more (fs.epoll.max_user_watches), or there is no memory."""
        try:
            self._epoll.register(connection.fd, select.EPOLLIN | select.EPOLLONESHOT)
        except OSError:
            return False
        return True

    def _has_room(self, had: Counter[int], user: int, descriptors: int) -> bool:
        """Whether a user may have one more connection. No user may have more than half of them, nor all users but the
        owner more than three quarters: a user may control the ids of others (subuid(5))."""
        room = had.total() < descriptors
        if self._owner == 0 != user:
            room &= had[user] < descriptors // 2 and had.total() - had[0] < descriptors - descriptors // 4
        return room

    def _turn_away(self) -> None:
        """Hang up on the first connection in the queue, with the descriptor kept for that. Else it would wait, and this
        loop would spin."""
        os.close(self._spare)
        with contextlib.suppress(OSError):
            self._listener.accept()[0].close()
        with contextlib.suppress(OSError):
            self._spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

    def _attend(self, connection: _Connection) -> None:
        """In a thread of `workers`: a connection sent something. The peer speaks first: an agent in binary, a client in
        JSON."""
        sock, caller = connection.sock, connection.caller
        stays = False
        try:
            sock.settimeout(TIMEOUT)
            if connection.who is not None and connection.domain is not None:
                self._join(connection, connection.who, connection.domain)
                return  # the socket is not ours any more
            data = wire.recv_plain_bytes(sock)
            if data.startswith(b"{"):
                control.handle(sock, data, caller, self._engines, self._owner)
            else:
                self._greet(connection, wire.decode(data))
            stays = True
        except (AddressSpaceGone, wire.WireError) as e:
            if not isinstance(e.__cause__, ConnectionError):  # to end, or to exec, in the middle of it is no news
                why = e.strerror or str(e) if isinstance(e, OSError) else f"process {caller.pid} did not join: {e}"
                self._scanner.tally.refuse("not allowed" if "may not join" in why else "protocol")
                log_once(f"who may not join (user {caller.uid})", why)
        except OSError:
            pass  # it is gone, or does not read what it asked for
        finally:
            if stays:
                connection.ends, connection.heard = time.monotonic() + TIMEOUT, False
                self._epoll.modify(connection.fd, select.EPOLLIN | select.EPOLLONESHOT)
            elif self._connections.get(connection.fd) is connection:  # else its number may be another's already
                with contextlib.suppress(OSError):
                    self._epoll.unregister(connection.fd)
                self._end(connection)

    def _end(self, connection: _Connection) -> None:
        """In a thread of `workers`, since closing may take long if something is left in the socket."""
        self._forget(connection)
        close_one(connection.sock)
        self._connected_less(connection.caller.uid)
        if connection.who is not None:
            self._room_again(connection.caller.uid)

    def _forget(self, connection: _Connection) -> None:
        with self._lock:
            if self._connections.get(connection.fd) is connection:
                del self._connections[connection.fd]

    def _connected_less(self, user: int) -> None:
        with self._lock:
            self._connected[user] -= 1
            if self._connected[user] <= 0:
                del self._connected[user]

    # -- agents -----------------------------------------------------------------------------------------

    def _greet(self, connection: _Connection, hello: wire.Packet) -> None:
        caller = connection.caller
        if self._owner not in (0, caller.uid):
            raise AddressSpaceGone(
                f"process {caller.pid} of user {caller.uid} may not join: not the user of this service"
            )
        if caller.pid == 0:
            raise AddressSpaceGone("a process of another pid namespace, which has no pid here, may not join")
        if self._doubtful[caller.uid] >= DOUBTFUL_MAX:
            raise AddressSpaceGone(f"process {caller.pid} may not join: its user sent what no agent sends")
        try:
            who = identify_peer(connection.sock, caller.pid, caller.connected)
        except (FileNotFoundError, ProcessLookupError):
            raise ConnectionResetError(errno.ECONNRESET, ENDED) from None  # no news
        except OSError as e:
            raise AddressSpaceGone(f"process {caller.pid} may not join: it cannot be seen who it is: {e}") from e
        if set(who.uids) != {caller.uid} or set(who.gids) != {caller.gid}:
            ids = f"user {caller.uid} and group {caller.gid}, but its ids are {who.uids} and {who.gids}"
            raise AddressSpaceGone(f"process {caller.pid} may not join: it is {ids}")
        connection.asked, connection.groups = asked_domain(hello, caller.pid), frozenset(groups(connection.sock))
        place = self._place(who, connection.asked, connection.groups)
        if place.domain is None:
            raise AddressSpaceGone(f"process {caller.pid} is left alone: {place.why}")
        self._take_room(caller)
        connection.who, connection.domain = who, place.domain
        may_have = caller.uid == self._owner or self._userfaultfd_group in {None, *connection.groups}
        userfaultfd = self._userfaultfd if may_have else -1
        connection.comm = greet(connection.sock, hello, caller.pid, self._terms, userfaultfd)

    def _place(self, who: Identity, asked: str, groups: frozenset[int]) -> Place:
        """Where a process belongs. Raises OSError if it has ended."""
        policy = self._policy
        return policy.place(who, group_of(who.pid) if policy.looks_at_groups else NOWHERE, asked, groups)

    def _misplaced(self, who: Identity, asked: str, groups: frozenset[int], domain: MergeDomain) -> str:
        """Why a process that joined `domain` does not belong there any more; "" if it does."""
        place = self._place(who, asked, groups)
        if place.domain == domain:
            return ""
        where = f"it belongs in merge domain {place.domain} now" if place.domain else "it is to be left alone"
        return f"{where} ({place.why})"

    def _take_room(self, caller: Caller) -> None:
        """Reserve a descriptor. Raises ConnectionRefusedError if there is none for one more process."""
        with self._lock:
            have = self._processes.total()
            room = self._has_room(self._processes, caller.uid, self._shares.processes)
            self._processes[caller.uid] += room
        if not room:
            why = f"{have} have, and this service may open {self._shares.limit} descriptors"
            self._scanner.tally.refuse("no descriptors")
            log_once(f"no room for a process (user {caller.uid})", f"process {caller.pid} may not join: {why}")
            raise ConnectionRefusedError(errno.ECONNREFUSED, why)

    def _join(self, connection: _Connection, who: Identity, domain: MergeDomain) -> None:
        pid = connection.caller.pid
        space = AgentAddressSpace.ready(connection.sock, pid, domain, connection.comm, who)
        space.misplaced = partial(self._misplaced, who, connection.asked, connection.groups, domain)
        with self._lock:
            before = [fd for fd, other in self._spaces.items() if other.pid == space.pid]
        for fd in before:  # one mm_slot a process: drop the one from before an exec
            self._leave(fd)
        if connection.caller.uid != self._owner:
            space.hurry = HURRY
        self._scanner.introduce(space.pid)
        with self._lock:
            self._spaces[connection.fd] = space
            del self._connections[connection.fd]
            self._epoll.modify(connection.fd, select.EPOLLRDHUP)
            self._scanner.enter(space)
            self.joined += 1
        self._connected_less(connection.caller.uid)

    def _leave(self, fd: int) -> None:
        with self._lock:
            space = self._spaces.pop(fd, None)
        if space is None:
            return
        self._epoll.unregister(fd)
        space.hang_up(ENDED)
        user = space.owner.user
        if space.gone != ENDED:
            line = f"process {space.pid} ({space.comm}) is not served any more: {space.gone}"
            log_once(f"a process that is not served any more (user {user})", line)
        with self._lock:
            self._doubtful[user] += space.doubtful
        self._before_leave()
        self._scanner.exit(space)
        self._workers.submit(user, partial(self._gone, space, user))

    def _gone(self, space: AgentAddressSpace, user: int) -> None:
        """In a thread of `workers`, as `_end`."""
        space.close(close_one)
        self._room_again(user)

    def _room_again(self, user: int) -> None:
        with self._lock:
            self._processes[user] -= 1
            if self._processes[user] <= 0:
                del self._processes[user]
