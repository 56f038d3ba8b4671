"""The service that is watched."""

from __future__ import annotations

from typing import Any

from samepage.service.control import Client
from samepage.service.sockets import ControlError

PATIENCE = 3.0
"""Seconds that a service has to answer."""

Row = dict[str, Any]


class Service:
    """The one at `path`. One thread at a time may look; ControlError says in a line what is wrong."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._client: Client | None = None

    def look(self) -> tuple[Row, list[Row]]:
        """Counters, and a row for each process."""
        try:
            if self._client is None:
                self._client = Client(self.path, PATIENCE)
            answer = self._client.ask("status", brief=True)
        except ControlError:
            self.close()
            raise
        return answer["counters"], answer.get("processes", [])

    def close(self) -> None:
        """Until the next look."""
        if self._client is not None:
            self._client.close()
        self._client = None

    def available(self, pid: int) -> Row | None:
        """The row of a process with what is available to it, for which it is asked."""
        with Client(self.path, PATIENCE) as client:
            rows = client.ask("status").get("processes", [])
        return next((row for row in rows if row["pid"] == pid), None)

    def set_run(self, run: int) -> None:
        """Stop (0) or go on (1)."""
        with Client(self.path, PATIENCE) as client:
            client.ask("set", knob="run", value=str(run))

    def unmerge(self, pid: int) -> Row:
        """How far it came."""
        with Client(self.path, None) as client:
            return list(client.stream("unmerge", pids=[pid]))[-1]
