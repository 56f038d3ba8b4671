"""A daemon that systemd starts: it serves the socket it is given, says when it is ready, and leaves it there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from samepage.service import sockets
from samepage.service.control import Client
from tests.commands.test_service_commands import environment

AS_SYSTEMD = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_PID'] = str(os.getpid()); "
AS_SYSTEMD += "os.execv(sys.executable, [sys.executable, '-m', 'samepage', 'daemon', *sys.argv[2:]])"


def start(listener: socket.socket, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", AS_SYSTEMD, str(listener.fileno())]
    variables = environment(LISTEN_FDS="1", NOTIFY_SOCKET=str(folder / "notify"))
    return subprocess.Popen(
        command, env=variables, pass_fds=[listener.fileno()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_it_serves_that_socket_and_says_when_it_is_ready(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with sockets.listen(path) as listener, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(tmp_path / "notify"))
        told.settimeout(20)
        with start(listener, tmp_path) as daemon:
            assert told.recv(100) == b"READY=1"
            with Client(path) as client:
                assert client.ask("get", knob="run")["knobs"] == {"run": "1"}
            daemon.terminate()
            assert daemon.wait(10) == 0
        assert os.path.exists(path)  # for the next one, whom systemd starts
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as waiting:
            waiting.connect(path)


def test_a_socket_of_another_kind_is_refused_in_one_line(tmp_path: Path) -> None:
    with (
        sockets.listen(str(tmp_path / "socket"), kind=socket.SOCK_STREAM) as listener,
        start(listener, tmp_path) as daemon,
    ):
        _, said = daemon.communicate(timeout=20)
    assert (daemon.returncode, said.count("\n")) == (1, 1)
    assert "ListenSequentialPacket" in said


def test_sockets_for_another_process_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from samepage.service import systemd

    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "1")
    assert systemd.listener() is None
