"""Unix sockets of services: where they are, who is at the other end, how one is made.

Separate from `control`, because `samepage run` needs only this, and should start its command soon.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import socket
import stat
import struct
import time
from pathlib import Path
from typing import NamedTuple

DAEMON_PATH = "/run/samepage.sock"

POLICY_PATH = "/etc/samepage/policy.toml"
"""The policy of root's daemon, if the file exists: it says which merge domain processes are in (`policy`)."""

DOMAIN_NAME = r"^[A-Za-z_][A-Za-z0-9_.-]{0,30}$"
"""A merge domain's name: it must not look like a user id, and must fit into `sp_hello.domain`."""

SO_PEERGROUPS = 59

OVERFLOW_UID = 65534
"""The kernel's default for user ids that have no name in this user namespace."""


class ControlError(OSError):
    """The service refused, or cannot be reached. `errno` is set; `strerror` says what to do in one line."""


class Caller(NamedTuple):
    """Who is at the other end, as the kernel says (SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int = 0
    connected: float = math.inf
    """It had by then, in seconds since the machine was started."""


def peer(sock: socket.socket) -> Caller:
    """Who connected; on the client's side, who listens."""
    pid, uid, gid = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return Caller(pid, uid, gid, time.clock_gettime(time.CLOCK_BOOTTIME))


def groups(sock: socket.socket) -> set[int]:
    """All groups that the peer had when it connected. Python asks for none if there are more than 256 besides its
    own."""
    found = {peer(sock).gid}
    with contextlib.suppress(OSError):
        found.update(gid for (gid,) in struct.iter_unpack("I", sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 1024)))
    return found


def anybody() -> int:
    """The user id that stands for all users without an id in this user namespace; -1 if every user has one."""
    try:
        rows = Path("/proc/self/uid_map").read_text().split()
        return -1 if rows == ["0", "0", str((1 << 32) - 1)] else int(Path("/proc/sys/kernel/overflowuid").read_text())
    except OSError:
        return OVERFLOW_UID


def default_path() -> str:
    """Where the daemon of this user listens."""
    uid = os.getuid()
    if uid == 0:
        return DAEMON_PATH
    folder = os.environ.get("XDG_RUNTIME_DIR")
    return f"{folder}/samepage.sock" if folder else f"/tmp/samepage-{uid}/samepage.sock"


def policy_path() -> str | None:
    """The default policy file of this user's daemon."""
    return POLICY_PATH if os.getuid() == 0 and os.path.lexists(POLICY_PATH) else None


def running() -> str | None:
    """The path where a daemon answers: this user's own, else root's, which serves everybody."""
    return next((path for path in dict.fromkeys((default_path(), DAEMON_PATH)) if answers(path)), None)


def find(path: str | None = None) -> str:
    """The service to talk to: `path` if given, else `$SAMEPAGE_SOCKET`, else the daemon that answers."""
    return path or os.environ.get("SAMEPAGE_SOCKET") or running() or default_path()


def listen(path: str, everybody: bool = False, kind: int = socket.SOCK_SEQPACKET) -> socket.socket:
    """A listening socket at `path`, which only this user can connect to, or `everybody`.

    Removes the stale socket of a service that ended without. Raises `ControlError`: EADDRINUSE when a service answers
    there, or what the system says.
    """
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        _remove_stale(path, kind)
        umask = os.umask(0o111 if everybody else 0o177)
        try:
            sock.bind(path)
        finally:
            os.umask(umask)
        sock.listen(512)
    except OSError as e:
        sock.close()
        if isinstance(e, ControlError):
            raise
        raise ControlError(e.errno or errno.EINVAL, f"cannot listen at {path}: {e.strerror or e}") from e
    return sock


def _remove_stale(path: str, kind: int) -> None:
    try:
        mode = Path(path).lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ControlError(errno.EEXIST, f"{path} is there already, and is no socket")
    if nobody_listens(path, kind):
        Path(path).unlink()
        return
    raise ControlError(errno.EADDRINUSE, f"a service is listening at {path} already")


def nobody_listens(path: str, kind: int = socket.SOCK_SEQPACKET, seconds: float = 1.0) -> bool:
    """Whether a socket is left over from a service that ended. OSError: that cannot be known, within `seconds`."""
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.settimeout(seconds)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
    return False


def answers(path: str) -> bool:
    """Whether a service of root or this user listens at `path`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
            return peer(probe).uid in {0, os.getuid()} - {anybody()}
        except OSError:
            return False
