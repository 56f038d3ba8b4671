"""What holds for all tests."""

from __future__ import annotations

import os
import signal

from hypothesis import settings

# The same examples every time, however slow the machine is. `pytest --hypothesis-profile=default` looks for new ones.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

# Under nohup, or behind a shell's `&`, these are ignored, and whatever the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

_OURS = os.getpid()


def _terminated(signum: int, _frame: object) -> None:
    """Whoever ends the tests (timeout(1), say) ends what they started, too, and has the kernel's switches put back."""
    if os.getpid() == _OURS:
        raise KeyboardInterrupt
    signal.signal(signum, signal.SIG_DFL)  # a child of a fork
    os.kill(os.getpid(), signum)


signal.signal(signal.SIGTERM, _terminated)
