"""A mount namespace of its own for a command, in which the tree stands where the kernel's files are on the host."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from samepage.service.log import log
from samepage.service.sockets import ControlError

KSM = "/sys/kernel/mm/ksm"
PROCESS_FILES = ("ksm_merging_pages", "ksm_stat")

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_BIND, MS_REC, MS_SLAVE = 1 << 12, 1 << 14, 1 << 19


class Namespace:
    """How a command gets a mount namespace of its own: its process calls `enter` before it executes it.

    There, the files of `tree` are mounted over /sys/kernel/mm/ksm, and over ksm_stat and ksm_merging_pages in
    /proc/PID of every process that joins the service at `socket`. A *keeper*, a process that lives in the namespace
    until `end` or until the service is gone, sees to the latter. OSError when this kernel has no KSM.
    """

    def __init__(self, tree: str, socket: str) -> None:
        if not os.path.isdir(KSM):
            raise OSError(errno.ENOENT, f"there is no {KSM} to put the tree over: this kernel has no KSM")
        self._tree = tree
        self._libc = ctypes.CDLL(None, use_errno=True)
        told, self._tell = os.pipe()
        self._hear, said = os.pipe()
        self._keeper = os.fork()
        if self._keeper == 0:
            self._keep(socket, told, said)
        os.close(told)
        os.close(said)

    def enter(self) -> None:
        """Move this process into the namespace. It must be single-threaded, and sees its own files before it joins.

        A user other than root gets a user namespace too, with the same user and group in it. OSError: `strerror` is one
        line.
        """
        self._unshare()
        # What the host mounts later shall arrive here, but nothing from here there.
        self._call(self._libc.mount, b"none", b"/", None, MS_REC | MS_SLAVE, None, what="mount --make-rslave /")
        self._bind(self._tree, KSM)
        self._show_process(os.getpid())
        os.write(self._tell, str(os.getpid()).encode())
        if not os.read(self._hear, 1):
            raise OSError(errno.EIO, "no process could be started in the command's mount namespace")

    def end(self) -> None:
        """The namespace itself stays as long as a process is in it."""
        for fd in (self._tell, self._hear):
            os.close(fd)
        os.kill(self._keeper, signal.SIGKILL)
        os.waitpid(self._keeper, 0)

    def _keep(self, socket: str, told: int, said: int) -> NoReturn:
        """The keeper."""
        try:
            os.setsid()  # what the terminal sends to the command's process group is not for it
            # A process that asks whether its peer is still there must not find that peer's descriptors here.
            for fd in map(int, os.listdir("/proc/self/fd")):
                if fd not in (0, 1, 2, told, said):
                    with contextlib.suppress(OSError):  # that of the listing
                        os.close(fd)
            self._introduce(socket, told, said)
        except Exception as e:
            log(f"processes that join are not shown in /proc: {e}")
        finally:
            os._exit(0)

    def _introduce(self, socket: str, told: int, said: int) -> None:
        """As each process joins, put its files into its place in /proc. Mounts there go when the process goes."""
        from samepage.service.control import Client

        with Client(socket, timeout=None) as client:
            packets = client.stream("introduce")
            next(packets)
            pid = os.read(told, 20)
            if not pid:  # there is no command after all
                return
            self._follow(int(pid))
            os.write(said, b".")
            os.close(said)
            with contextlib.suppress(ControlError):  # the service ended
                for packet in packets:
                    with contextlib.suppress(OSError):  # the process has gone, or the server of the files has
                        self._show_process(packet["joined"])
                    client.acknowledge()

    def _follow(self, pid: int) -> None:
        """Into the namespaces of a process, and to its root directory."""
        root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_CLOEXEC)
        spaces = [os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in ("user", "mnt")]
        if os.path.samestat(os.stat("/proc/self/ns/user"), os.fstat(spaces[0])):
            os.close(spaces.pop(0))  # nobody can enter the user namespace he is in
        for fd in spaces:
            self._call(self._libc.setns, fd, 0, what="setns")
            os.close(fd)
        os.fchdir(root)
        os.chroot(".")
        os.close(root)

    def _unshare(self) -> None:
        """unshare(2): as root, or what passes for it; else with a user namespace, in which this user is the same."""
        uid, gid = os.geteuid(), os.getegid()
        if self._libc.unshare(CLONE_NEWNS) == 0:
            return
        try:
            self._call(self._libc.unshare, CLONE_NEWUSER | CLONE_NEWNS, what="unshare")
        except OSError as e:
            why = f"no mount namespace for the command ({e.strerror}): run as root, or allow user namespaces here"
            raise OSError(e.errno, why) from e
        Path("/proc/self/setgroups").write_text("deny")  # else no group may be mapped (user_namespaces(7))
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")

    def _show_process(self, pid: int) -> None:
        for name in PROCESS_FILES:
            ours, kernels = f"{self._tree}/.proc/{pid}/{name}", f"/proc/{pid}/{name}"
            if os.path.exists(kernels) and os.stat(kernels).st_dev != os.stat(ours).st_dev:  # it may join again
                self._bind(ours, kernels)

    def _bind(self, source: str, target: str) -> None:
        paths = os.fsencode(source), os.fsencode(target)
        self._call(self._libc.mount, *paths, None, MS_BIND, None, what=f"mount --bind {target}")

    def _call(self, function: Callable[..., int], *arguments: object, what: str) -> None:
        if function(*arguments):
            code = ctypes.get_errno()
            raise OSError(code, f"{what}: {os.strerror(code)}")
