"""What `samepage record`, `simulate` and `fleet` fail with: one line, whether a library is missing or a recording."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from samepage.commands import CommandError

OPTIONAL = frozenset({"duckdb", "highspy", "ibis", "matplotlib", "pyarrow"})
"""What the extra `samepage[fleet]` installs."""


@contextlib.contextmanager
def fleet_errors() -> Iterator[None]:
    """Meanwhile a library that is not installed, and a FleetError, is a CommandError."""
    from samepage.fleet import FleetError

    try:
        yield
    except FleetError as e:
        raise CommandError(str(e)) from e
    except ModuleNotFoundError as e:
        name = (e.name or "").partition(".")[0]
        if name not in OPTIONAL:
            raise
        raise CommandError(f"{name} is not installed: pip install 'samepage[fleet]'") from e
