"""What is found out, by asking the kernel and by trying. Nothing is changed, and nothing here is slow to load, for
`samepage run` looks before it starts its command."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from samepage import agent

SYS_USERFAULTFD, SYS_MBIND, SYS_MEMFD_CREATE = 323, 237, 319  # on x86-64

# include/uapi/linux/userfaultfd.h
USERFAULTFD_IOC_NEW, UFFDIO_API, UFFD_API, UFFD_USER_MODE_ONLY = 0xAA00, 0xC018AA3F, 0xAA, 1
FEATURE_WP, FEATURE_WP_FILES, FEATURE_MOVE = 1 << 0, 1 << 12, 1 << 16

PAGEMAP_SCAN = 0xC0606610

SEGMENT_FLAGS = 0x1 | 0x2 | 0x8
"""MFD_CLOEXEC, MFD_ALLOW_SEALING, MFD_NOEXEC_SEAL: of what the agent makes segments of. The last is of Linux 6.3."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Numbers are -1 where they cannot be read."""

    kernel: str
    userfaultfd: str
    """How it is to be had: by "device" or "syscall"; "user mode" when it does not hold up system calls; "none"."""
    move: bool
    """UFFDIO_MOVE."""
    write_protect: bool
    write_protect_files: bool
    pagemap_scan: bool
    mbind: bool
    memfd: bool
    seccomp: int
    """How many filters this process is under."""
    fatal_call: int
    """The number of a system call of the agent's that they do not let a process survive; 0: none."""
    confined: str
    """By a profile of AppArmor's, or a context of SELinux's: its name; "": by none."""
    cgroup: int
    """Version of the hierarchy that has the memory controller; 0: none."""
    memory_limit: int
    """Of this process's own memory cgroup, in bytes; -1: none."""
    max_map_count: int
    fuse: bool
    ksm: int
    """/sys/kernel/mm/ksm/run."""
    thp: str
    thp_shmem: str

    @property
    def version(self) -> tuple[int, int]:
        """Of the kernel."""
        major, minor = [*self.kernel.split("."), "0"][:2]
        return int(major), int("".join(c for c in minor if c.isdigit()) or 0)


def look() -> Facts:
    """Look at this machine as this user."""
    libc = ctypes.CDLL(None, use_errno=True)
    filters = agent.filters()
    fatal = agent.trial() if filters else 0
    way, features = ("none", 0) if fatal else _userfaultfd(libc)
    version, limit = _memory_cgroup()
    return Facts(
        kernel=os.uname().release,
        userfaultfd=way,
        move=bool(features & FEATURE_MOVE),
        write_protect=bool(features & FEATURE_WP),
        write_protect_files=bool(features & FEATURE_WP_FILES),
        pagemap_scan=_pagemap_scan(),
        mbind=not fatal and libc.syscall(SYS_MBIND, 0, 0, 0, None, 0, 0) == 0,  # of nothing
        memfd=not fatal and _memfd(libc),
        seccomp=filters,
        fatal_call=fatal,
        confined=_confined(),
        cgroup=version,
        memory_limit=limit,
        max_map_count=_number("/proc/sys/vm/max_map_count"),
        fuse=os.access("/dev/fuse", os.R_OK | os.W_OK),
        ksm=_number("/sys/kernel/mm/ksm/run"),
        thp=_chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
        thp_shmem=_chosen("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
    )


def _userfaultfd(libc: ctypes.CDLL) -> tuple[str, int]:
    """How it is to be had, by the ways that agents try (agent/kernel/kernel.c), and UFFD_FEATURE_... of the kernel."""
    way, fd = "device", -1
    with contextlib.suppress(OSError):
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
        try:
            fd = fcntl.ioctl(device, USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
        finally:
            os.close(device)
    for other, flag in (("syscall", 0), ("user mode", UFFD_USER_MODE_ONLY)):
        if fd < 0:
            way, fd = other, libc.syscall(SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK | flag)
    if fd < 0:
        return "none", 0
    api = bytearray(struct.pack("3Q", UFFD_API, 0, 0))
    try:
        fcntl.ioctl(fd, UFFDIO_API, api)
    except OSError:
        return "none", 0
    finally:
        os.close(fd)
    features: int = struct.unpack("3Q", api)[1]
    return way, features


def _pagemap_scan() -> bool:
    scan = bytearray(struct.pack("12Q", 96, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1 << 3, 1 << 3))  # an empty range
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            fcntl.ioctl(file, PAGEMAP_SCAN, scan)
    except OSError as e:
        return e.errno not in (errno.ENOTTY, errno.ENOENT, errno.EACCES)
    return True


def _memfd(libc: ctypes.CDLL) -> bool:
    for flags in (SEGMENT_FLAGS, SEGMENT_FLAGS & 3):
        fd = libc.syscall(SYS_MEMFD_CREATE, b"samepage", flags)
        if fd >= 0:
            os.close(fd)
            return True
    return False


def _confined() -> str:
    name = _text("/proc/self/attr/apparmor/current") or _text("/proc/self/attr/current")  # the first: Linux 5.8
    name = name.strip("\0\n ")
    return "" if name in ("unconfined", "kernel") else name


def _memory_cgroup() -> tuple[int, int]:
    for line in _text("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            limit = _number(f"/sys/fs/cgroup/memory{path}/memory.limit_in_bytes")
            return 1, -1 if limit >= 1 << 62 else limit
        if not controllers and "memory" in _text("/sys/fs/cgroup/cgroup.controllers").split():
            return 2, _number(f"/sys/fs/cgroup{path}/memory.max")
    return 0, -1


def _number(path: str) -> int:
    text = _text(path).strip()
    return int(text) if text.isdigit() else -1


def _chosen(path: str) -> str:
    """Of "always [madvise] never" what stands in brackets."""
    return _text(path).partition("[")[2].partition("]")[0]


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
