"""Making the memory of a running process mergeable by the kernel's KSM, by calls in its name."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator

from samepage import inject
from samepage.kernel.target import TargetError, check
from samepage.process.mappings import mappings

SYS_MADVISE, SYS_PRCTL = {"x86_64": (28, 157), "aarch64": (233, 167)}.get(os.uname().machine, (-1, -1))
"""-1, which the kernel refuses, if inject/ has no code for this machine."""
PR_SET_MEMORY_MERGE = 67
MADV_MERGEABLE = 12


def merge_all_of_this() -> None:
    """All memory of this process, its children, and the programs they become, is mergeable from now on. OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0):
        number = ctypes.get_errno()
        why = "this kernel has no PR_SET_MEMORY_MERGE" if number == errno.EINVAL else os.strerror(number)
        raise OSError(number, f"the kernel cannot merge it: {why}")


@contextlib.contextmanager
def meant(pid: int) -> Iterator[int]:
    """A pidfd, opened before anything is looked at, so that whoever has the pid later is not touched. What `inject`
    refuses becomes a `TargetError`."""
    try:
        with inject.opened(pid) as pidfd:
            yield pidfd
    except inject.InjectError as e:
        if e.error == inject.Error.GONE:
            check(pid)  # says it better: there is no pidfd of a thread
        raise TargetError(pid, e.args[0]) from e


def calls(pid: int, made: list[inject.Call], pidfd: int | None = None) -> list[int]:
    """`inject.make_calls` of a process that was checked. `TargetError`."""
    with meant(pid) if pidfd is None else contextlib.nullcontext(pidfd) as fd:
        check(pid)
        return inject.make_calls(pid, made, fd)


def attach(pid: int, prctl: bool = True) -> None:
    """Make all of its memory mergeable, including what it maps later. If the kernel lacks PR_SET_MEMORY_MERGE (before
    6.4), or with `prctl` false, only the memory that it has now. `TargetError`: nothing was changed."""
    answers = calls(pid, [(SYS_PRCTL, PR_SET_MEMORY_MERGE, 1, 0, 0, 0)]) if prctl else [-errno.EINVAL]
    if answers[-1] == -errno.EINVAL:
        advise(pid)
    elif answers[-1] < 0:
        raise TargetError(pid, f"prctl(PR_SET_MEMORY_MERGE): {os.strerror(-answers[-1])}")


def advise(pid: int) -> None:
    """MADV_MERGEABLE for each of its mappings."""
    wanted = [mapping for mapping in mappings(pid) if not mapping.mergeable]
    while wanted:
        answers = calls(pid, [(SYS_MADVISE, m.start, m.end - m.start, MADV_MERGEABLE) for m in wanted])
        if answers[-1] < 0 and answers[-1] != -errno.ENOMEM:  # ENOMEM: it was unmapped meanwhile
            raise TargetError(pid, f"madvise(MADV_MERGEABLE): {os.strerror(-answers[-1])}")
        wanted = wanted[len(answers) :]


def release_unmerged(pid: int) -> None:
    """Switch PR_SET_MEMORY_MERGE off again, right after `attach` saw a program that has ended: the program that took
    its place has the agent."""
    with contextlib.suppress(inject.InjectError):
        inject.make_calls(pid, [(SYS_PRCTL, PR_SET_MEMORY_MERGE, 0, 0, 0, 0)])


def release(pid: int, pidfd: int) -> None:
    """Make memory that it maps from now on not mergeable. Call it only when nothing of the process is merged: the
    kernel would copy it all at once."""
    answer = calls(pid, [(SYS_PRCTL, PR_SET_MEMORY_MERGE, 0, 0, 0, 0)], pidfd)[-1]
    if answer < 0 and answer != -errno.EINVAL:
        raise TargetError(pid, f"prctl(PR_SET_MEMORY_MERGE): {os.strerror(-answer)}")
