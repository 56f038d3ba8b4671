"""Running a command for somebody else, so that nobody notices: its signals, its terminal, its exit status."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
from collections.abc import Callable, Iterable
from typing import NoReturn

from samepage.commands import CommandError

FORWARDED = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
)

SI_KERNEL = 0x80
"""`si_code` of a signal nobody sent with kill(): for these, one that the terminal sent."""


def locate(command: str) -> str:
    """The path of the program `command` names. `CommandError` with status 127 or 126, as shells have it."""
    found = command if "/" in command else shutil.which(command, mode=os.F_OK)
    if found is None or not os.path.exists(found):
        raise CommandError(f"{command}: command not found", 127)
    if os.path.isdir(found):
        raise CommandError(f"{command}: is a directory", 126)
    if not os.access(found, os.X_OK):
        raise CommandError(f"{command}: not executable", 126)
    return found


def start(program: str, argv: list[str], environment: dict[str, str], enter: Callable[[], None] | None = None) -> int:
    """Start `program`; returns its pid. Signals meant for it stay blocked here, for `wait` to pass on.

    `enter` is called in the child before it becomes the program. `CommandError` with status 126 when the kernel cannot
    execute it, with status 1 when `enter` raises OSError.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it was ignored, nobody could be waited for
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*FORWARDED, signal.SIGCHLD})
    reading, writing = os.pipe()  # which an exec closes
    pid = os.fork()
    if pid == 0:
        _become(program, argv, environment, before, enter, writing)
    os.close(writing)
    with open(reading) as failure:
        status, _, why = failure.read().partition(" ")
    if status:
        os.waitpid(pid, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        raise CommandError(why, int(status))
    return pid


def _become(
    program: str,
    argv: list[str],
    environment: dict[str, str],
    mask: Iterable[int],
    enter: Callable[[], None] | None,
    failure: int,
) -> NoReturn:
    """The child: execute the program, or say over the pipe `failure` with what status and why not."""
    status, about = 1, ""
    try:
        if enter is not None:
            enter()
        status, about = 126, f"{argv[0]}: "
        # Python ignores these two, and an ignored signal stays ignored over exec. A handler of Python's would
        # take a signal that comes before the exec, and nobody would ever hear of it.
        for number in (signal.SIGPIPE, signal.SIGXFSZ, *FORWARDED):
            if number not in FORWARDED or callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        try:
            os.execve(program, argv, environment)
        except OSError as e:
            if e.errno != errno.ENOEXEC:
                raise
            # A script without #!: a shell runs it, and so does execvp().
            os.execve("/bin/sh", ["/bin/sh", program, *argv[1:]], environment)
    except OSError as e:
        os.write(failure, f"{status} {about}{e.strerror}".encode())
    finally:
        os._exit(1)


def wait(pid: int, meanwhile: Callable[[], None] | None = None, every: float = 1.0) -> int:
    """Wait for `pid`, passing signals on; returns the exit status a shell would give: 128 + n for signal n.
    `meanwhile` is called `every` so many seconds.

    A signal that the terminal sends goes to the whole foreground process group, so the command has had it. Ctrl-Z
    stops this process together with the command, for it keeps SIGTSTP's default.
    """
    while True:
        expected = {*FORWARDED, signal.SIGCHLD}
        info = signal.sigtimedwait(expected, every) if meanwhile else signal.sigwaitinfo(expected)
        if info is None:
            if meanwhile:
                meanwhile()
            continue
        if info.si_signo != signal.SIGCHLD:
            if info.si_code != SI_KERNEL:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, info.si_signo)
            continue
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
