"""Who a process is, as the kernel says: whether it is still the one that joined, and whose it is.

A peer says nothing of this, and cannot. Its pid may have been given to another process; the process may have changed
its user ids, entered another user namespace, or executed another program, a set-user-ID one perhaps, while somebody
else keeps its connection open.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from dataclasses import dataclass
from pathlib import Path

SO_PEERPIDFD = 77
"""include/uapi/asm-generic/socket.h, Linux 6.5."""

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Identity:
    """`uids` and `gids`: real, effective, saved, and that for files. `started` tells processes of one pid apart,
    `stack` (where it begins; 0: we may not know) the programs that one process executes. `userns`: inode of its user
    namespace, or 0."""

    uids: tuple[int, ...]
    gids: tuple[int, ...]
    started: int
    stack: int
    userns: int
    pid: int

    @property
    def domain(self) -> int:
        """The merge domain."""
        return domain_of(self.uids[0], self)

    def differs(self, other: Identity) -> str:
        """What is not the same, in words; "" if nothing is."""
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


def domain_of(uid: int, who: Identity) -> int:
    """The merge domain: a user id in one user namespace. It is the user id alone in the service's own. A process that
    hides its namespace, because it is protected from its own user, has a domain to itself."""
    if who.userns == OWN_USERNS:
        return uid
    return uid | (who.userns or 1 << 31 | who.pid) << 32  # no namespace has so small an inode


def user_of(domain: int) -> int:
    """The user id in a merge domain."""
    return domain & 0xFFFFFFFF


def identify(pid: int) -> Identity:
    """OSError: there is no such process (any more). All is read of one, also if its pid is given away meanwhile."""
    folder = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # After the last bracket, for a name may hold anything: state is field 3, starttime 22, startstack 28.
        stat = _read("stat", folder).rpartition(b")")[2].split()
        status = _read("status", folder)
        return Identity(
            _ids(status, b"\nUid:"), _ids(status, b"\nGid:"), int(stat[22 - 3]), int(stat[28 - 3]), _userns(folder), pid
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
    """False also where the kernel cannot tell."""
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
    """KiB that a process had resident at most, and those that are swapped out now."""
    lines = Path(f"/proc/{pid}/status").read_bytes().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith((b"VmHWM:", b"VmSwap:")))


def _read(name: str, folder: int) -> bytes:
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


def _userns(folder: int | None = None) -> int:
    """Where it may not be known (the process is protected from its own user), 0."""
    try:
        return os.stat("ns/user" if folder is not None else "/proc/self/ns/user", dir_fd=folder).st_ino
    except OSError:
        return 0


OWN_USERNS = _userns()
