"""From one machine to a fleet: what memory holds over time, what settings would do, and who belongs together.

`record` looks at processes again and again, as `samepage scan` does, and writes a keyed hash of each page as Parquet
(`schema`, `key`). `space` presents a recording to ksmd as address spaces, and `replay` lets the time of the recording
pass for them. `queries` finds what is equal within and between many hosts, by Ibis expressions that any engine can run.
`placement` says which workloads to put together. `synthetic` makes a fleet from a few recordings.

All of this needs the extra `samepage[fleet]`; nothing else in samepage does.
"""

from __future__ import annotations


class FleetError(Exception):
    """Something the user can put right; the message is one line."""
