"""From one machine to a fleet: what memory holds over time, what settings would do, and who belongs together.

`record` looks at processes again and again, as `samepage scan` does, and writes what it saw as Parquet (`schema`): of
each page a hash, made with a key of the fleet's (`key`). `space` gives a recording back to ksmd as address spaces, and
`replay` lets the time of the recording pass for them. `queries` asks of many hosts' recordings what is equal within and
between them, once, as Ibis expressions, for whichever engine runs them; `placement` says which workloads to put
together. `synthetic` makes a fleet of a few recordings.

All of it needs what the extra `samepage[fleet]` installs; nothing else in samepage does.
"""

from __future__ import annotations


class FleetError(Exception):
    """Something the user can put right; the message is one line."""
