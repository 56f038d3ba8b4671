"""A service in threads of the test's own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from samepage.service import sockets
from samepage.service.scanner import Scanner
from samepage.service.server import Server


@contextlib.contextmanager
def serving(path: str, everybody: bool = False, **how: Any) -> Iterator[Scanner]:
    """One that listens at `path`, and ends when the block does."""
    scanner = Scanner()
    server = Server(sockets.listen(path, everybody=everybody), scanner, **how)
    threads = [threading.Thread(target=run, daemon=True) for run in (scanner.run, server.run)]
    for thread in threads:
        thread.start()
    yield scanner
    server.stop()
    scanner.stop()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
