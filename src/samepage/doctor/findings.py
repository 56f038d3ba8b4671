"""What the facts mean, in plain words, and what to change."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from samepage.doctor.facts import Facts

OLDEST = (5, 10)
"""Before, a thread cannot have a file table of its own (CLOSE_RANGE_UNSHARE, 5.9), and nothing was tried on less."""

NOT_HELD_UP = (
    "only regions that programs merge themselves (samepage.register) will be merged, for this user's userfaultfd "
    "cannot hold up system calls: let root run `samepage daemon`, which this command then joins, or set "
    "vm.unprivileged_userfaultfd=1"
)

NO_MOVE = (
    "nothing is merged by itself, for Linux {} has no UFFDIO_MOVE (6.8 has it), which leaves pages alone that are held "
    "for I/O: take a newer kernel, or the kernel's own KSM, or choose --swap wp (docs/safety.md says what that is)"
)

Swap = str
"""As in `samepage status`: "move", "wp", "quiet", "quiet_wp" or "none"."""


@dataclass(frozen=True, slots=True)
class Finding:
    """`state`: "ok", "less" (it works, but less well) or "stop" (nothing is merged)."""

    name: str
    value: str
    state: str
    means: str = ""
    change: str = ""


def too_old(facts: Facts) -> str:
    """Why samepage refuses this kernel; "" if it does not."""
    if facts.version >= OLDEST:
        return ""
    return f"Linux {facts.kernel} is too old: {OLDEST[0]}.{OLDEST[1]} is the oldest that samepage runs on"


def forbidden(facts: Facts) -> str:
    """Why nothing is done under the seccomp filters that there are; "" if they let an agent live."""
    if not facts.fatal_call:
        return ""
    return (
        f"nothing is merged, for a seccomp filter ends processes that make system call {facts.fatal_call} (systemd's "
        "SystemCallFilter=, say), which samepage needs: allow it, or have an error answer it (SystemCallErrorNumber=)"
    )


def way_to_swap(facts: Facts, chosen: str) -> Swap:
    """What agents of this user come to (agent/kernel/kernel.c), if `chosen` is "move" or "wp"."""
    held_up = facts.userfaultfd in ("device", "syscall")
    if facts.move and facts.pagemap_scan and chosen != "wp" and facts.userfaultfd != "none":
        return "move" if held_up else "quiet"
    if not facts.write_protect or not held_up:
        return "none"
    return "wp" if chosen == "wp" and facts.mbind else "quiet_wp"


def hindrance(facts: Facts, chosen: str) -> str:
    """The one line that says why memory is not merged by itself and what to do; "" if it is."""
    way = way_to_swap(facts, chosen)
    if way in ("move", "wp"):
        return ""
    if facts.fatal_call:
        return forbidden(facts)
    if facts.userfaultfd == "user mode":
        return NOT_HELD_UP
    if way == "none":
        return "nothing is merged, for userfaultfd is not to be had here: the kernel has none, or seccomp forbids it"
    if chosen == "wp":
        return (
            "nothing is merged by itself, for --swap wp needs mbind(2), by which pages that are held are found, and "
            "that is forbidden here (seccomp): allow it, or take a kernel with UFFDIO_MOVE (6.8)"
        )
    return NO_MOVE.format(facts.kernel)


def not_swapped(ways: Iterable[Swap]) -> str:
    """Why no process could swap pages, if none could; `ways` are those they had."""
    ways = set(ways)
    if not ways or ways & {"move", "wp"}:
        return ""
    if "quiet_wp" in ways:
        return (
            "no page may be swapped by write-protection unless that is chosen (--swap wp), and there is no UFFDIO_MOVE "
            "(Linux 6.8); or --swap wp was, and mbind(2) is forbidden, or the program can have huge pages, for "
            "it was not `samepage run --swap wp` that started it"
        )
    if "quiet" in ways:
        return "no page could be swapped, for want of userfaultfd for system calls"
    return (
        "no page could be swapped: a process may not have userfaultfd, or not look into its own page tables, as after "
        "it changed its user without executing a program"
    )


def examine(facts: Facts, chosen: str = "move") -> list[Finding]:
    """All there is to say."""
    return [
        _kernel(facts),
        _userfaultfd(facts),
        _swap(facts, chosen),
        _check("PAGEMAP_SCAN", facts.pagemap_scan, "every look hashes all memory again", "Linux 6.7 has it"),
        _check("memfd", facts.memfd, "there is nothing to keep shared pages in", "allow memfd_create(2)", bad="stop"),
        _check("mbind", facts.mbind, "pages that were merged and then written are not merged again", "allow mbind(2)"),
        _seccomp(facts),
        _confined(facts),
        _cgroup(facts),
        _map_count(facts),
        _check("FUSE", facts.fuse, "--mount and --sysfs do not work", "give this user /dev/fuse"),
        _ksm(facts),
        _huge_pages(facts),
    ]


def _check(name: str, there: bool, means: str, change: str, bad: str = "less") -> Finding:
    return Finding(name, "yes", "ok") if there else Finding(name, "no", bad, means, change)


def _kernel(facts: Facts) -> Finding:
    why = too_old(facts)
    return Finding("kernel", facts.kernel, "stop" if why else "ok", why, "take a newer kernel" if why else "")


def _userfaultfd(facts: Facts) -> Finding:
    if facts.userfaultfd in ("device", "syscall"):
        return Finding("userfaultfd", facts.userfaultfd, "ok")
    if facts.userfaultfd == "none":
        return Finding("userfaultfd", "none", "stop", "no page can be swapped", "allow userfaultfd(2)")
    means = "it does not hold up system calls, so only what programs merge themselves is merged"
    change = "let root run `samepage daemon`, or set vm.unprivileged_userfaultfd=1"
    return Finding("userfaultfd", "user mode only", "less", means, change)


def _swap(facts: Facts, chosen: str) -> Finding:
    way = way_to_swap(facts, chosen)
    if way in ("move", "wp"):
        return Finding("swap", way, "ok")
    return Finding("swap", way, "stop" if way == "none" else "less", hindrance(facts, chosen))


def _seccomp(facts: Facts) -> Finding:
    if not facts.seccomp:
        return Finding("seccomp", "no filter", "ok")
    if facts.fatal_call:
        return Finding("seccomp", f"kills for system call {facts.fatal_call}", "stop", forbidden(facts))
    return Finding("seccomp", "a filter", "ok", "what it forbids is in the other lines")


def _confined(facts: Facts) -> Finding:
    if not facts.confined:
        return Finding("confined", "by nothing", "ok")
    return Finding("confined", f"by {facts.confined}", "ok", "what it forbids is in the other lines")


def _cgroup(facts: Facts) -> Finding:
    limit = f", limit {facts.memory_limit >> 20} MiB" if facts.memory_limit >= 0 else ""
    if facts.cgroup:
        return Finding("memory cgroup", f"version {facts.cgroup}{limit}", "ok")
    return Finding("memory cgroup", "none", "ok", "unmerging looks at the machine's memory alone")


def _map_count(facts: Facts) -> Finding:
    value = str(facts.max_map_count)
    if facts.max_map_count >= 65530:
        return Finding("vm.max_map_count", value, "ok")
    means = "merging cuts mappings until a process has seven eighths of that"
    return Finding("vm.max_map_count", value, "less", means, "sysctl vm.max_map_count=65530")


def _ksm(facts: Facts) -> Finding:
    if facts.ksm != 1:
        return Finding("kernel's KSM", "not there" if facts.ksm < 0 else "off", "ok")
    return Finding(
        "kernel's KSM", "runs", "ok", "under samepage MADV_MERGEABLE is samepage's; it does not reach the kernel's"
    )


def _huge_pages(facts: Facts) -> Finding:
    value = f"{facts.thp or 'none'}, of shared memory {facts.thp_shmem or 'none'}"
    if facts.thp_shmem in ("always", "within_size"):
        return Finding("huge pages", value, "ok")
    change = "echo within_size > /sys/kernel/mm/transparent_hugepage/shmem_enabled"
    return Finding(
        "huge pages", value, "ok", "merging takes a quarter less CPU time with large folios for copies", change
    )
