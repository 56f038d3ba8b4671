"""Containers with the seccomp profiles of Docker and Podman: bwrap, with a filter that libseccomp makes of one."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PROFILES = {
    "Podman": Path("/usr/share/containers/seccomp.json"),
    "Docker": Path("/usr/share/gocode/src/github.com/docker/docker/profiles/seccomp/default.json"),
}
"""Where Debian's golang-github-containers-common and golang-github-docker-docker-dev have them."""

CAPABILITIES = [
    f"CAP_{name}"
    for name in [
        "CHOWN",
        "DAC_OVERRIDE",
        "FOWNER",
        "FSETID",
        "KILL",
        "SETGID",
        "SETUID",
        "SETPCAP",
        "NET_BIND_SERVICE",
        "SYS_CHROOT",
        "SETFCAP",
    ]
]
"""What both give to root of a container, but for raw sockets and devices."""

LIBSECCOMP = "libseccomp.so.2"
_ACTIONS = {"SCMP_ACT_ALLOW": 0x7FFF0000, "SCMP_ACT_ERRNO": 0x00050000}
_COMPARISONS = {"SCMP_CMP_NE": 1, "SCMP_CMP_EQ": 4, "SCMP_CMP_MASKED_EQ": 7}


class _Compare(ctypes.Structure):
    """`struct scmp_arg_cmp`."""

    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


def _conditions(rule: dict[str, Any], key: str) -> list[bool]:
    """Which of a rule's conditions hold on this machine, with these capabilities."""
    conditions, found = rule.get(key) or {}, []
    if "caps" in conditions:
        found.append(bool(set(conditions["caps"]) & set(CAPABILITIES)))
    if "arches" in conditions:
        found.append({"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()] in conditions["arches"])
    return found


def _action(name: str, errno: int | None) -> int:
    return _ACTIONS[name] | (errno or 1 if name == "SCMP_ACT_ERRNO" else 0)


def filter_of(profile: Path, file: Path) -> Path:
    """Writes the program that a profile comes to, and returns the file."""
    content = json.loads(profile.read_text())
    library = ctypes.CDLL(LIBSECCOMP)
    library.seccomp_init.restype = ctypes.c_void_p
    default = _action(content["defaultAction"], content.get("defaultErrnoRet"))
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(default)))
    for rule in content["syscalls"]:
        action = _action(rule["action"], rule.get("errnoRet"))
        if not all(_conditions(rule, "includes")) or any(_conditions(rule, "excludes")) or action == default:
            continue
        compared = [
            _Compare(arg["index"], _COMPARISONS[arg["op"]], arg["value"], arg.get("valueTwo", 0))
            for arg in rule.get("args") or ()
        ]
        for name in rule["names"]:
            number = library.seccomp_syscall_resolve_name(name.encode())
            if number >= 0:  # else it is another processor's
                array = (_Compare * len(compared))(*compared)
                added = library.seccomp_rule_add_array(
                    context, ctypes.c_uint32(action), number, ctypes.c_uint(len(compared)), array
                )
                assert added == 0, f"{name}: {os.strerror(-added)}"
    with file.open("wb") as out:
        assert library.seccomp_export_bpf(context, out.fileno()) == 0
    library.seccomp_release(context)
    return file


def container(program: Path, mounts: dict[str, str], arguments: Iterable[str], **variables: str) -> list[str]:
    """The command that runs another one as root of a container of this machine's own files, under a filter."""
    command = ["bwrap", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--die-with-parent", "--cap-drop", "ALL"]
    command += [word for capability in CAPABILITIES for word in ("--cap-add", capability)]
    # Python may be elsewhere than in /usr.
    shown = {"/usr": "/usr", "/sys": "/sys", sys.base_prefix: sys.base_prefix} | mounts
    command += [word for at, source in shown.items() for word in ("--ro-bind", source, at)]
    for name in ("bin", "lib", "lib64", "sbin"):
        command += ["--symlink", f"usr/{name}", f"/{name}"]
    command += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
    command += [word for key, value in variables.items() for word in ("--setenv", key, value)]
    # A shell opens the filter, since bwrap wants a descriptor.
    return ["sh", "-c", f'exec "$@" 9<{program}', "sh", command[0], "--seccomp", "9", *command[1:], *arguments]
