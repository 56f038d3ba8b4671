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

KSM = "/sys/kernel/mm/ksm"
PROCESS_FILES = ("ksm_merging_pages", "ksm_stat")

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_BIND, MS_REC, MS_SLAVE = 1 << 12, 1 << 14, 1 << 19


class Namespace:
    """Mounts over /sys/kernel/mm/ksm, and over ksm_stat and ksm_merging_pages in /proc/PID of every process that joins.

    A process of its own lives in the namespace and does that, until `end` is called or the service at `socket` is gone.
    Who is not root gets a user namespace too, with the same user and group in it. The constructor raises OSError, whose
    `strerror` is one line.
    """

    def __init__(self, tree: str, socket: str) -> None:
        if not os.path.isdir(KSM):
            raise OSError(errno.ENOENT, f"there is no {KSM} to put the tree over: this kernel has no KSM")
        self._tree = tree
        self._libc = ctypes.CDLL(None, use_errno=True)
        reading, writing = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            self._live(socket, writing)
        os.close(writing)
        with open(reading) as outcome:
            code, _, why = outcome.read().partition(" ")
        if code != "0":
            os.waitpid(self._pid, 0)
            raise OSError(int(code or errno.EIO), why or "the namespace could not be made")

    def enter(self) -> None:
        """Called by a single-threaded process, which is in the namespace then, and sees its own files before it joins.

        OSError, whose `strerror` is one line.
        """
        for kind in ("user", "mnt"):
            ours, theirs = f"/proc/self/ns/{kind}", f"/proc/{self._pid}/ns/{kind}"
            if not os.path.samefile(ours, theirs):
                fd = os.open(theirs, os.O_RDONLY | os.O_CLOEXEC)
                self._call(self._libc.setns, fd, 0, what="setns")
                os.close(fd)
        self._show_process(os.getpid())

    def end(self) -> None:
        """The namespace stays as long as a process is in it."""
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)

    def _live(self, socket: str, outcome: int) -> NoReturn:
        """The forked process."""
        said = "0"
        try:
            os.setsid()  # what the terminal sends to the command's process group is not for it
            # Who looks at whether its peer is still there must not find that peer's descriptors here.
            os.closerange(3, outcome)
            os.closerange(outcome + 1, os.sysconf("SC_OPEN_MAX"))
            self._make()
        except OSError as e:
            said = f"{e.errno} {e.strerror}"
        try:
            os.write(outcome, said.encode())
            os.close(outcome)
            if said == "0":
                self._introduce(socket)
        finally:
            os._exit(0)

    def _make(self) -> None:
        self._unshare()
        # What the host mounts later shall arrive here, but nothing from here there.
        self._call(self._libc.mount, b"none", b"/", None, MS_REC | MS_SLAVE, None, what="mount --make-rslave /")
        self._bind(self._tree, KSM)

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

    def _introduce(self, socket: str) -> None:
        """As each process joins, put its files into its place in /proc. Mounts there go when the process goes."""
        from samepage.service.control import Client

        with Client(socket, timeout=None) as client:
            for packet in client.stream("introduce"):
                if "joined" in packet:
                    with contextlib.suppress(OSError):  # it has gone, or the server of the files has
                        self._show_process(packet["joined"])
                    client.acknowledge()

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
