"""A process to attach to: what the kernel says of it, and why it is left alone."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
from pathlib import Path

from samepage.process.halt import FROZEN, halt_of

SECCOMP = {
    "1": "it is in strict seccomp mode, which would kill it for the call",
    "2": "it has a seccomp filter, which could kill it for the call",
}


class TargetError(Exception):
    """Why a process is left alone, in one line that names it."""

    def __init__(self, pid: int, why: str) -> None:
        self.why = why
        super().__init__(f"process {pid} ({name(pid)}): {why}" if os.path.exists(f"/proc/{pid}") else _no_such(pid))


def _no_such(pid: int) -> str:
    return f"process {pid}: no such process"


def name(pid: int) -> str:
    """Its comm; "?" when it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").rstrip("\n")
    except OSError:
        return "?"


def has_agent(pid: int) -> bool:
    """Whether samepage's agent is in a process. OSError."""
    return "/libsamepage.so" in Path(f"/proc/{pid}/maps").read_text(errors="replace")


def check(pid: int) -> None:
    """Raise `TargetError` if no call may be made in the process's name. Touches nothing."""
    try:
        status = dict(re.findall(r"^(\w+):\t(.*)$", Path(f"/proc/{pid}/status").read_text(errors="replace"), re.M))
    except OSError:
        raise TargetError(pid, "it has ended") from None
    if status["Tgid"] != str(pid):
        raise TargetError(pid, f"this is a thread of process {status['Tgid']}")
    if why := _of_its_state(pid, status) or _of_its_place(pid, status) or _of_its_program(pid, status):
        raise TargetError(pid, why)


def _of_its_state(pid: int, status: dict[str, str]) -> str | None:
    if status["State"][0] in "ZX":
        return "its first thread has ended"
    if "VmSize" not in status:
        return "it is a kernel thread"
    if status["TracerPid"] != "0":
        return f"it is traced already, by process {status['TracerPid']} ({name(int(status['TracerPid']))})"
    if status["State"][0] in "Tt":
        return "it is stopped by a signal"
    if (halt := halt_of(pid, pid)) and halt.why == FROZEN:
        return "its cgroup is frozen"
    return None


def _of_its_place(pid: int, status: dict[str, str]) -> str | None:
    uid = int(status["Uid"].split()[0])
    if os.geteuid() not in (0, uid):
        with contextlib.suppress(KeyError):
            return f"it is another user's ({pwd.getpwuid(uid).pw_name})"
        return f"it is another user's ({uid})"
    for space, word in (("pid", "PID"), ("user", "user")):
        try:
            same = os.readlink(f"/proc/{pid}/ns/{space}") == os.readlink(f"/proc/self/ns/{space}")
        except OSError:
            return "permission denied: the kernel does not let this user look at it"
        if not same:
            return f"it is in another {word} namespace: what runs in different containers is not merged with each other"
    return None


def _of_its_program(pid: int, status: dict[str, str]) -> str | None:
    if why := SECCOMP.get(status.get("Seccomp", "0")):
        return why
    if "shstk" in status.get("x86_Thread_features", ""):
        return "it has a shadow stack, by which it could not return if samepage were killed"
    try:
        with open(f"/proc/{pid}/exe", "rb") as program:
            if program.read(5)[4:] != b"\2":  # ELFCLASS64
                return "it is not a 64-bit program"
        if has_agent(pid):
            return "samepage's agent is in it: a process is served by one engine"
    except OSError:
        return "permission denied: the kernel does not let this user look at it"
    return None
