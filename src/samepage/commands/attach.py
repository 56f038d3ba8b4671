"""`samepage attach` and `samepage detach`."""

from __future__ import annotations

import argparse
import signal
from types import FrameType

from samepage.commands import add_reserve
from samepage.commands.streams import say


class Attach:
    """Have the kernel's KSM merge the memory of processes that run already.

    For what samepage's agent cannot be in: statically linked programs, virtual machines, whatever was started without
    `samepage run`. A process is held for less than a millisecond, and a system call is made in its name
    (PR_SET_MEMORY_MERGE, which its children inherit; before Linux 6.4 MADV_MERGEABLE for the memory it has).
    As root, ksmd is started if it does not run, until the last of these processes has ended or was detached.

    The exit status is 1 if one of them was left alone; one line on stderr says why.
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("pids", metavar="PID", type=int, nargs="+")

    def run(self, args: argparse.Namespace) -> int:
        from samepage.kernel.attach import attach
        from samepage.kernel.settings import Settings, SettingsError
        from samepage.kernel.target import TargetError

        attached = []
        for pid in args.pids:
            try:
                attach(pid)
                attached.append(pid)
            except TargetError as e:
                say(str(e))
        settings = Settings()
        if attached:
            try:
                settings.hold(attached, {"run": "1"})
            except SettingsError as e:
                if not settings.running():
                    say(f"nothing is merged, for ksmd does not run: {e}")
                    return 1
        return 0 if len(attached) == len(args.pids) else 1


class Detach:
    """Give processes their own copies of what the kernel merged, and have it merge no more of them.

    Stops with ENOMEM before the memory runs out, as `samepage unmerge` does: what was done stays done, the rest stays
    merged, and calling again goes on. So does Ctrl-C.
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        add_reserve(parser)
        parser.add_argument("pids", metavar="PID", type=int, nargs="+")

    def run(self, args: argparse.Namespace) -> int:
        from samepage.commands.unmerge import explain
        from samepage.kernel.settings import Settings
        from samepage.kernel.target import TargetError
        from samepage.kernel.unmerge import Merged, detach

        detached, merged, cancelled = [], Merged(), Cancelled()
        for pid in args.pids:
            try:
                outcome = detach(pid, merged, args.reserve, cancelled)
                if outcome.errno is None:
                    detached.append(pid)
                else:
                    say(f"process {pid}: {explain(outcome)}")
            except TargetError as e:
                say(str(e))
        Settings().release(detached)
        return 0 if len(detached) == len(args.pids) else 1


class Cancelled:
    """Whether Ctrl-C was pressed."""

    def __init__(self) -> None:
        self._pressed = False
        signal.signal(signal.SIGINT, self._press)

    def _press(self, _number: int, _frame: FrameType | None) -> None:
        self._pressed = True

    def __call__(self) -> bool:
        return self._pressed
