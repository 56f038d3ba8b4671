"""A mount namespace of its own for a command, in which the tree stands where the kernel's is on the host."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path

KSM = "/sys/kernel/mm/ksm"

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_BIND, MS_REC, MS_SLAVE = 1 << 12, 1 << 14, 1 << 19


def entering(tree: str) -> Callable[[], None]:
    """What a child has to do before it executes a command that shall see `tree` at /sys/kernel/mm/ksm.

    Its own /proc/PID/ksm_stat and ksm_merging_pages are the tree's, too. Who is not root gets a user namespace, with
    the same user and group in it. OSError when there is no such place; the child raises OSError, whose `strerror` is
    one line.
    """
    if not os.path.isdir(KSM):
        raise OSError(errno.ENOENT, f"there is no {KSM} to put the tree over: this kernel has no KSM")
    libc = ctypes.CDLL(None, use_errno=True)

    def enter() -> None:
        _unshare(libc)
        # What the host mounts later shall arrive here, but nothing from here there.
        _call(libc.mount, b"none", b"/", None, MS_REC | MS_SLAVE, None, what="mount --make-rslave /")
        _bind(libc, tree, KSM)
        for name in ("ksm_stat", "ksm_merging_pages"):
            with contextlib.suppress(FileNotFoundError):  # kernels before 6.1 do not have them
                _bind(libc, f"{tree}/.proc/{os.getpid()}/{name}", f"/proc/{os.getpid()}/{name}")

    return enter


def _call(function: Callable[..., int], *arguments: object, what: str) -> None:
    if function(*arguments):
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def _bind(libc: ctypes.CDLL, source: str, target: str) -> None:
    os.stat(target)
    _call(libc.mount, os.fsencode(source), os.fsencode(target), None, MS_BIND, None, what=f"mount --bind {target}")


def _unshare(libc: ctypes.CDLL) -> None:
    """unshare(2): as root, or what passes for it; else with a user namespace, in which this user is the same."""
    uid, gid = os.geteuid(), os.getegid()
    if libc.unshare(CLONE_NEWNS) == 0:
        return
    try:
        _call(libc.unshare, CLONE_NEWUSER | CLONE_NEWNS, what="unshare")
    except OSError as e:
        raise OSError(
            e.errno, f"no mount namespace for the command ({e.strerror}): run as root, or allow user namespaces here"
        ) from e
    Path("/proc/self/setgroups").write_text("deny")  # else no group may be mapped (user_namespaces(7))
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
