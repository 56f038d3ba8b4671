"""What holds for all tests."""

from __future__ import annotations

import signal

from hypothesis import settings

# The same examples every time, however slow the machine is. `pytest --hypothesis-profile=default` looks for new ones.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

# Under nohup, or behind a shell's `&`, these are ignored, and whatever the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
