"""The agent as Python sees it: libsamepage.so, loaded into this process, and its C interface.

The agent's thread is C and never takes the GIL; every call here releases it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
from pathlib import Path
from typing import NamedTuple

from samepage.libraries import installed

NAME = "libsamepage.so"

MIN_ALLOC = 1 << 20
"""Bytes of the smallest allocation that it serves unless told otherwise. What is smaller is libc's."""

UNSEEN = "what limits the process (its memory cgroup, or the machine) cannot be read from inside of it"
"""Why there is no memory where a break was `unseen`."""


class Broken(ctypes.Structure):
    """`struct sp_broken` of `agent/base/wire.h`."""

    _fields_ = (
        ("pages_unmerged", ctypes.c_uint64),
        ("pages_remaining", ctypes.c_uint64),
        ("bytes_needed", ctypes.c_uint64),
        ("bytes_available", ctypes.c_uint64),
        ("cpu_ns", ctypes.c_uint64),
        ("error", ctypes.c_int32),
        ("unseen", ctypes.c_uint32),
    )


class Step(NamedTuple):
    """Outcome of one `unmerge` call: `errno` 0 (all done), EAGAIN (call again) or what stopped it."""

    errno: int
    pages_unmerged: int
    pages_remaining: int
    bytes_needed: int
    bytes_available: int
    unseen: bool


def library_path() -> Path:
    """Where libsamepage.so is, existing or not: `$SAMEPAGE_LIBRARY`, else as `installed` says."""
    if path := os.environ.get("SAMEPAGE_LIBRARY"):
        return Path(path).absolute()
    return installed(NAME)


def forbid_huge_pages() -> None:
    """In this process and all that it starts: by write-protection no others are merged (agent/kernel/holders.c)."""
    PR_SET_THP_DISABLE = 41
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0):
        code = ctypes.get_errno()
        raise OSError(code, f"huge pages cannot be forbidden: {os.strerror(code)}")


@functools.cache
def load() -> ctypes.CDLL:
    """The library with its prototypes; the one that was preloaded when it was. OSError when it is missing."""
    # The loader compares files, so the absolute path gives a preloaded library its old handle.
    library = ctypes.CDLL(str(library_path()), mode=ctypes.RTLD_LOCAL)
    for name, arguments in {
        "samepage_join": [ctypes.c_char_p],
        "samepage_attach": [ctypes.c_int],
        "samepage_serve": [ctypes.c_size_t],
        "samepage_register": [ctypes.c_void_p, ctypes.c_size_t],
        "samepage_unmerge": [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.POINTER(Broken)],
        "samepage_quiet": [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int],
        "samepage_mode": [],
        "samepage_strmode": [ctypes.c_int],
        "samepage_trial": [],
    }.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = ctypes.c_int
    library.samepage_strmode.restype = ctypes.c_char_p
    library.samepage_trial.restype = ctypes.c_long
    return library


def _check(result: int, what: str) -> int:
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return result


def trial() -> int:
    """The number of a system call of the agent's that is fatal under the seccomp filters of this process, tried in a
    child; 0: none is."""
    result: int = load().samepage_trial()
    return _check(result, "cannot try what seccomp filters forbid")


def filters() -> int:
    """Under how many seccomp filters this process is; 0 where the kernel does not say (before 5.9)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Seccomp_filters:"):
                return int(line.split()[1])
    return 0


def join(path: str) -> None:
    """Start the agent's thread, which joins the service at `path`, now and whenever it comes back."""
    _check(load().samepage_join(os.fsencode(path)), "cannot join")


def preloaded() -> bool:
    """Whether the agent stands in front of libc in this process: then it sees what the program does to its memory."""
    return hasattr(ctypes.CDLL(None), "samepage_join")


def preload(library: Path, others: str) -> str:
    """`$LD_PRELOAD` with the agent before `others`. OSError: the loader cannot be told this path."""
    if any(c in ": \t\n" for c in str(library)):
        raise OSError(errno.EINVAL, f"the agent cannot be preloaded from a path with a space or colon in it: {library}")
    if others.replace(" ", ":").split(":")[0] == str(library):
        return others
    return f"{library}:{others}" if others else str(library)


def serve(nbytes: int) -> None:
    """From now on the agent's malloc takes blocks of `nbytes` and more from the agent's own memory."""
    load().samepage_serve(nbytes)


def attach(fd: int) -> None:
    """Start the agent's thread over the connected socket `fd`, which becomes the agent's."""
    _check(load().samepage_attach(fd), "cannot attach")


def register(address: int, nbytes: int) -> None:
    """MADV_MERGEABLE for whole pages."""
    _check(load().samepage_register(address, nbytes), "cannot register")


def unmerge(address: int, nbytes: int, max_pages: int) -> Step:
    """Break at most `max_pages` merged pages of the range; when none is left it is no longer mergeable."""
    out = Broken()
    result: int = load().samepage_unmerge(address, nbytes, max_pages, ctypes.byref(out))
    return Step(
        -result,
        out.pages_unmerged,
        out.pages_remaining,
        out.bytes_needed,
        out.bytes_available,
        bool(out.unseen),
    )


def quiet(address: int, nbytes: int, on: bool) -> None:
    """The caller vows that nobody touches the range while `on`."""
    _check(load().samepage_quiet(address, nbytes, on), "cannot declare quiet")


def mode() -> int | None:
    """How pages are swapped (`enum sp_swap`), or None while no service is joined."""
    result: int = load().samepage_mode()
    return None if result == -errno.ENOTCONN else _check(result, "no agent")


def mode_name(mode: int) -> str:
    """`mode` in words."""
    text: bytes = load().samepage_strmode(mode)
    return text.decode()
