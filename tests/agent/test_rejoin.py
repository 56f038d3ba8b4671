"""An agent whom no service wants."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from samepage.memory import AddressSpaceGone, wire
from samepage.memory.agent import AgentAddressSpace
from samepage.memory.handshake import Terms
from samepage.process.merge_domain import MergeDomain
from tests.agent.preload import Preload

PROGRAM = ["/usr/bin/python3", "-c", "import time; b = bytearray(16 << 20); time.sleep(3); print(time.process_time())"]


def welcome_and_ask(sock: socket.socket) -> None:
    """As a service to which the answers are nonsense."""
    with contextlib.suppress(AddressSpaceGone):
        space = AgentAddressSpace.welcome(sock, wire.recv(sock), os.getpid(), MergeDomain(os.getuid()), Terms())
        assert space.areas().seq


@pytest.mark.parametrize("served", [False, True])
def test_an_agent_that_is_refused_does_not_come_again_at_once_nor_ever_more_seldom(
    preload: Preload, tmp_path: Path, served: bool
) -> None:
    came: list[float] = []
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(tmp_path / "socket"))
    listener.listen()

    def refuse() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            came.append(time.monotonic())
            if served:
                welcome_and_ask(sock)
            else:
                sock.recv(1000)
            sock.close()

    threading.Thread(target=refuse, daemon=True).start()
    took = float(preload.run(PROGRAM, socket=str(tmp_path / "socket")))
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    assert 3 <= len(came) <= 6  # after 0.2, 0.4, 0.8 s, ...
    assert took < 0.3
