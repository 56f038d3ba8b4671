"""Running a command for somebody else, so that nobody notices: its signals, its terminal, its exit status."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal

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


def start(program: str, argv: list[str], environment: dict[str, str]) -> int:
    """Start `program`; returns its pid. Signals meant for it stay blocked here, for `wait` to pass on.

    `CommandError` with status 126 when the kernel cannot execute it.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it was ignored, nobody could be waited for
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*FORWARDED, signal.SIGCHLD})
    # Python ignores these two, and an ignored signal stays ignored over exec.
    default = (signal.SIGPIPE, signal.SIGXFSZ)
    try:
        return os.posix_spawn(program, argv, environment, setsigmask=before, setsigdef=default)
    except OSError as e:
        if e.errno == errno.ENOEXEC:  # a script without #!: a shell runs it, and so does execvp()
            script = ["/bin/sh", program, *argv[1:]]
            return os.posix_spawn("/bin/sh", script, environment, setsigmask=before, setsigdef=default)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        raise CommandError(f"{argv[0]}: {e.strerror}", 126) from e


def wait(pid: int) -> int:
    """Wait for `pid`, passing signals on; returns the exit status a shell would give: 128 + n for signal n.

    A signal that the terminal sends goes to the whole foreground process group, so the command has had it. Ctrl-Z
    stops this process together with the command, for it keeps SIGTSTP's default.
    """
    while True:
        info = signal.sigwaitinfo({*FORWARDED, signal.SIGCHLD})
        if info.si_signo != signal.SIGCHLD:
            if info.si_code != SI_KERNEL:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, info.si_signo)
            continue
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
