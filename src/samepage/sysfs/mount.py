"""Starting and ending the process that serves the tree."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import IO

from samepage.service.ksm_files import FILES

PROGRAM = Path(__file__).parents[1] / "samepage-sysfs"

END_TIMEOUT = 10.0
"""Seconds that unmounting may take."""


class Mount:
    """The files of /sys/kernel/mm/ksm in `directory`, or in one made for them, as the service at `socket` has them.

    They are served by a process of its own, which unmounts and ends when `end` is called or the service, process
    `service_pid`, is gone, however it went. Raises OSError, whose `strerror` says in one line what is in the way.
    """

    def __init__(self, directory: str | None, socket: str, service_pid: int) -> None:
        program = _program()
        _check_fuse()
        private = directory is None
        self.directory = tempfile.mkdtemp(prefix="samepage-") if directory is None else _mountpoint(directory)
        pidfd = os.pidfd_open(service_pid)
        command = [program, os.path.abspath(socket), str(pidfd), self.directory, _options()]
        try:
            self._process = subprocess.Popen(
                [*command, "private"] if private else command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(pidfd,),
                start_new_session=True,  # what the terminal sends to the command's process group is not for it
            )
        finally:
            os.close(pidfd)
        why = self._await_mounted()
        if why is not None:
            if private:
                os.rmdir(self.directory)
            raise OSError(errno.EIO, f"cannot mount at {self.directory}: {why}")

    def _await_mounted(self) -> str | None:
        """Hand over the names and modes; None when all is well, else why not."""
        with _pipe(self._process.stdin) as table, _pipe(self._process.stdout) as said:
            with contextlib.suppress(BrokenPipeError):  # what it said counts
                table.write("".join(f"{name} {file.mode:o}\n" for name, file in FILES.items()).encode())
                table.close()
            lines = []
            for line in said:
                if line == b"mounted\n":
                    return None
                lines.append(line.decode(errors="replace").strip())
        status = self._process.wait()
        return next(filter(None, lines), f"{PROGRAM.name} ended with status {status}")

    def end(self) -> None:
        """Unmount, also when somebody has a file open in there."""
        with contextlib.suppress(OSError):
            self._process.terminate()
        try:
            self._process.wait(END_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def _program() -> str:
    if not PROGRAM.exists():
        raise OSError(
            errno.ENOENT,
            "this samepage was built without FUSE: install libfuse3-dev, libjansson-dev and pkgconf (as Debian calls "
            "them), then samepage again",
        )
    return str(PROGRAM)


def _check_fuse() -> None:
    """Whether this user may mount, as far as that can be seen."""
    device = "/dev/fuse"
    if not os.path.exists(device):
        raise OSError(errno.ENODEV, f"there is no {device}: load the kernel's module with `modprobe fuse`")
    if not os.access(device, os.R_OK | os.W_OK):
        raise OSError(
            errno.EACCES, f"this user may not open {device}: let root `chmod 666 {device}`, as it is elsewhere"
        )
    if os.geteuid() != 0 and not shutil.which("fusermount3"):
        raise OSError(errno.ENOENT, "fusermount3 is missing, with which users mount: install fuse3")


def _mountpoint(directory: str) -> str:
    """The absolute path of an existing directory."""
    path = os.path.abspath(directory)
    try:
        if not stat.S_ISDIR(os.stat(path).st_mode):
            raise OSError(errno.ENOTDIR, f"cannot mount at {directory}: not a directory")
    except FileNotFoundError:
        raise OSError(errno.ENOENT, f"cannot mount at {directory}: make the directory first") from None
    except OSError as e:
        if e.errno == errno.ENOTCONN:
            raise OSError(e.errno, f"cannot mount at {directory}: a dead mount is in the way, `umount` it first") from e
        raise
    return path


def _options() -> str:
    """How to mount. The kernel checks the modes. Root's tree is for everybody, as sysfs is; a user's for that user
    (fuse.conf's user_allow_other is rarely set). `auto_unmount` is for the case that the server is killed."""
    options = ["default_permissions", "noexec", "fsname=samepage", "subtype=ksm"]
    if os.geteuid() == 0:
        options.append("allow_other")
    if shutil.which("fusermount3"):
        options.append("auto_unmount")
    return ",".join(options)
