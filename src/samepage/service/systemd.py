"""What systemd passes to a service, and what the service tells systemd: sd_listen_fds(3), sd_notify(3)."""

from __future__ import annotations

import contextlib
import errno
import os
import socket

from samepage.service.sockets import ControlError

FIRST_FD = 3


def listener() -> socket.socket | None:
    """The listening socket that this process was started with; None if there is none. Raises ControlError if agents
    cannot connect to it."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    number = int(os.environ.get("LISTEN_FDS", "0"))
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):  # not for those that this process starts
        os.environ.pop(name, None)
    if not number:
        return None
    for fd in range(FIRST_FD, FIRST_FD + number):
        os.set_inheritable(fd, False)
    found = socket.socket(fileno=FIRST_FD)
    if number > 1 or (found.family, found.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
        raise ControlError(errno.EINVAL, "systemd's socket unit must have one ListenSequentialPacket= with a path")
    return found


def ready() -> None:
    """Tell systemd that the service is ready."""
    if path := os.environ.pop("NOTIFY_SOCKET", ""):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect("\0" + path[1:] if path.startswith("@") else path)
            sock.send(b"READY=1")
