"""The private service of `samepage run`: a forked process that lives as long as the command does.

This module is what the process that waits for the command needs of it, and loads neither numpy nor ksmd: the
socket listens before the command starts, while the service is still loading, so the command waits for nothing.
The service tells its parent what was saved over a socket pair, whose end is also how it learns that the
parent was killed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from samepage.service import sockets
from samepage.service.engine import Engine
from samepage.service.log import log
from samepage.service.sockets import ControlError

PACKET_MAX = 64 << 10
"""Bytes of what the service tells its parent, at most."""

FINISH_TIMEOUT = 10.0
"""Seconds the service has to write its last report."""


def leave_the_terminal() -> None:
    """First of all in a process that was forked to work beside the command: what the terminal sends to the command's
    process group is not for it, nor are the command's streams, but stderr."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)


class PrivateService:
    """A service for the processes that are given `path` as `$SAMEPAGE_SOCKET`.

    `knobs` are set before the first scan. `report` is a file that is kept up to date with what is saved. `reserve`, in
    bytes, is what unmerging and merging leave available. `write_protect`: pages are swapped that way. `others` makes
    the engines that it has besides, in its process. The constructor starts it; raises `ControlError` for knobs it does
    not know or values it does not accept.
    """

    def __init__(
        self,
        knobs: list[tuple[str, str]],
        report: Path | None,
        reserve: int = 16 << 20,
        write_protect: bool = False,
        others: Callable[[], Sequence[Engine]] = tuple,
    ) -> None:
        self._folder = _private_folder()
        self.path = str(self._folder / "socket")
        try:
            # As root: databases start as root and then become another user, and they are to join, too.
            self._listener = sockets.listen(self.path, everybody=os.getuid() == 0)
            self._line, line = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            started = time.monotonic()
            self.pid = os.fork()
            if self.pid == 0:
                self._line.close()
                self._serve(line, knobs, report, started, reserve, write_protect, others)
            line.close()
            self._listener.close()
            if knobs:
                self._await_knobs()
        except BaseException:
            self._remove()
            raise

    def finish(self) -> dict[str, Any] | None:
        """The command ended: have the last report written and get it. None when the service is there no more."""
        try:
            self._line.settimeout(FINISH_TIMEOUT)
            self._line.send(b"finish", socket.MSG_NOSIGNAL)
            while True:
                data = self._line.recv(PACKET_MAX)
                if not data:
                    return None
                answer: dict[str, Any] = json.loads(data)
                if "summary" in answer:
                    return dict(answer["summary"])
        except OSError:
            return None
        finally:
            self._line.close()
            self._remove()

    def _await_knobs(self) -> None:
        answer = json.loads(self._line.recv(PACKET_MAX) or b'{"error": "the service could not start"}')
        if "error" in answer:
            raise ControlError(errno.EINVAL, answer["error"])

    def _serve(
        self,
        line: socket.socket,
        knobs: list[tuple[str, str]],
        report: Path | None,
        started: float,
        reserve: int,
        write_protect: bool,
        others: Callable[[], Sequence[Engine]],
    ) -> NoReturn:
        """The forked process."""
        status = 1
        try:
            leave_the_terminal()
            from samepage.service.reporting import serve

            serve(self._listener, line, knobs, report, started, reserve, write_protect, others)
            status = 0
        except BaseException as e:
            with contextlib.suppress(BaseException):
                log(f"the service could not start: {e!r}")
        finally:
            with contextlib.suppress(BaseException):
                self._remove()
            os._exit(status)

    def fileno(self) -> int:
        return self._line.fileno()

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        with contextlib.suppress(OSError):
            self._folder.rmdir()


def _private_folder() -> Path:
    """A new directory with a name short enough for a socket's path, which only this user can enter; root's, where and
    as everybody can."""
    root = os.getuid() == 0
    for parent in ("/run" if root else None, os.environ.get("XDG_RUNTIME_DIR"), os.environ.get("TMPDIR"), "/tmp"):
        if parent and len(os.fsencode(parent)) < 64 and (not root or _everybody_enters(Path(parent))):
            folder = Path(parent) / f"samepage-{os.urandom(8).hex()}"
            with contextlib.suppress(OSError):
                _remove_those_of_killed_services(Path(parent))
                folder.mkdir(mode=0o700)
                if root:
                    folder.chmod(0o711)
                return folder
    raise ControlError(errno.EACCES, "no directory for the socket: set TMPDIR to a short path that is writable")


def _remove_those_of_killed_services(parent: Path) -> None:
    """Directories of this user in which nobody listens: a service that is killed leaves its own behind. One that was
    made a moment ago may be of a service that does not listen yet. /tmp is left alone: others can fill it."""
    if parent.stat().st_mode & 0o002:
        return
    for folder in parent.glob("samepage-" + "[0-9a-f]" * 16):
        with contextlib.suppress(OSError):
            status = folder.lstat()
            old_and_ours = status.st_uid == os.getuid() and time.time() - status.st_mtime > 60
            if old_and_ours and sockets.nobody_listens(str(folder / "socket"), seconds=0):
                (folder / "socket").unlink()
                folder.rmdir()


def _everybody_enters(folder: Path) -> bool:
    try:
        return all(path.stat().st_mode & 0o001 for path in (folder, *folder.resolve().parents))
    except OSError:
        return False
