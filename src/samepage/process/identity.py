"""Who a process is, as the kernel says: whether it is still the one that joined, and whose it is.

A peer says nothing of this, and cannot. Its pid may have been given to another process; the process may have changed
its user ids, entered another user namespace, or executed another program, a set-user-ID one perhaps, while somebody
else keeps its connection open.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import select
import socket
from dataclasses import dataclass
from pathlib import Path

from samepage.process.merge_domain import MergeDomain

SO_PEERPIDFD = 77
"""include/uapi/asm-generic/socket.h, Linux 6.5."""

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Identity:
    """`uids` and `gids`: real, effective, saved, and that for files. `started` tells processes of one pid apart,
    `stack` (where it begins; 0: we may not know) the programs that one process executes. `userns` and `container`:
    inodes of its user and PID namespaces; 0 if it hides them, and for the PID namespace of the service."""

    uids: tuple[int, ...]
    gids: tuple[int, ...]
    started: int
    stack: int
    userns: int
    pid: int
    container: int = 0

    @property
    def domain(self) -> MergeDomain:
        """The merge domain, where no policy gives it another."""
        return domain_of(self.uids[0], self)

    def differs(self, other: Identity) -> str:
        """Describe what differs; "" if nothing does."""
        if self.started != other.started:
            return "its pid is another process's"
        if self.stack and other.stack and self.stack != other.stack:
            return "it executed another program"
        if self.uids != other.uids:
            return "it changed its user ids"
        if self.gids != other.gids:
            return "it changed its group ids"
        if self.userns != other.userns:
            return "it entered another user namespace, or hides it"
        return ""

    def is_of(self, other: Identity) -> bool:
        """Whether it is the same process in the same program, whatever its user ids are by now."""
        return self.started == other.started and not (self.stack and other.stack and self.stack != other.stack)


def domain_of(uid: int, who: Identity) -> MergeDomain:
    """The merge domain without a policy: a user id in one user and one PID namespace, of which each container has
    its own. A process that hides its namespaces, for it is protected from its own user, is in a domain by itself."""
    hidden = 1 << 31 | who.pid  # no namespace has so small an inode
    userns = 0 if who.userns == OWN_USERNS else who.userns or hidden
    return MergeDomain(uid, userns, who.container)


def identify(pid: int) -> Identity:
    """Who a process is. All fields are of one process, even if its pid is reused meanwhile. Raises OSError if there is
    no such process (any more)."""
    folder = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # After the last bracket, for a name may hold anything: state is field 3, starttime 22, startstack 28.
        stat = _read("stat", folder).rpartition(b")")[2].split()
        status = _read("status", folder)
        return Identity(
            _ids(status, b"\nUid:"),
            _ids(status, b"\nGid:"),
            int(stat[22 - 3]),
            int(stat[28 - 3]),
            _namespace("user", folder),
            pid,
            _container(folder),
        )
    finally:
        os.close(folder)


def identify_peer(sock: socket.socket, pid: int, connected: float) -> Identity:
    """Who process `pid` is, which had connected `sock` by `connected` (seconds since the machine was started).

    OSError: it has ended, and others may have its connection. Its number may be another process's by now, of another
    user namespace perhaps."""
    who = identify(pid)
    if who.started > connected * TICKS or _has_peer_ended(sock):
        raise ProcessLookupError(errno.ESRCH, "who connected has ended")
    return who


def _has_peer_ended(sock: socket.socket) -> bool:
    """Whether the peer has ended. Also False if the kernel cannot tell."""
    try:
        pidfd = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as e:
        if e.errno == errno.ENOPROTOOPT:
            return False
        raise
    try:
        ended = select.poll()
        ended.register(pidfd, select.POLLIN)
        return bool(ended.poll(0))
    finally:
        os.close(pidfd)


def _ids(status: bytes, name: bytes) -> tuple[int, ...]:
    return tuple(map(int, status.partition(name)[2].partition(b"\n")[0].split()))


def has_ended(pid: int) -> bool:
    """Whether there is nothing left of a process but its exit status. OSError: not even that."""
    state, threads = _state(pid)
    return state in (b"Z", b"X") and threads <= 1  # where only its first thread has, others may run on


def _state(pid: int) -> tuple[bytes, int]:
    """That of its first thread, and how many threads there are."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        stat = file.read().rpartition(b")")[2].split()
    return stat[0], int(stat[20 - 3])


def memory_of(pid: int) -> int:
    """KiB that a process had resident at most, and those that are swapped out now. ProcessLookupError: it has none any
    more, for it ends."""
    folder = Path(f"/proc/{pid}")
    # The first thread has no memory once it has ended, and others may run on.
    for status in itertools.chain([folder / "status"], folder.glob("task/*/status")):
        with contextlib.suppress(OSError):
            lines = status.read_bytes().split(b"\n")  # its name may have any other character
            kib = [int(line.split()[1]) for line in lines if line.startswith((b"VmHWM:", b"VmSwap:"))]
            if kib:
                return sum(kib)
    raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))


def _read(name: str, folder: int) -> bytes:
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


def _namespace(kind: str, folder: int | None = None) -> int:
    """The inode of a namespace; 0 if it may not be known (the process is protected from its own user)."""
    try:
        return os.stat(f"ns/{kind}" if folder is not None else f"/proc/self/ns/{kind}", dir_fd=folder).st_ino
    except OSError:
        return 0


OWN_USERNS = _namespace("user")
OWN_PIDNS = _namespace("pid")


def _container(folder: int) -> int:
    """The PID namespace, where it is not the service's own. No process ever leaves the one it was born in."""
    found = _namespace("pid", folder)
    return 0 if found == OWN_PIDNS else found
