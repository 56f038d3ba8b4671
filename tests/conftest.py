"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# The same examples every time, however slow the machine is. `pytest --hypothesis-profile=default` looks for new ones.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")
