"""Which processes `samepage run` looks at for its report."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from samepage.service.machine import MachineDaemon, is_near

NOBODY = 65534
AWAY = "import os, sys, time; os.fork() and os._exit(0); os.setuid(int(sys.argv[1])); print(os.getpid(), flush=True); "
HERE = "import os, sys, time; os.setuid(int(sys.argv[1])); print(os.getpid(), flush=True); "

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become another user")


@pytest.fixture
def daemon() -> MachineDaemon:
    return MachineDaemon("/nowhere", None)


@pytest.fixture
def sleeping(request: pytest.FixtureRequest, daemon: MachineDaemon) -> Iterator[int]:
    """The pid of a process with the command's mark: another user's, and what it does first."""
    start, uid = request.param
    environment = os.environ | dict([daemon.variable])
    command = [sys.executable, "-c", f"{start} sys.stdin.read()", str(uid)]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    yield int(process.stdout.readline())
    process.communicate()


@pytest.mark.parametrize("sleeping", [(HERE, 0), (HERE, NOBODY), (AWAY, 0)], indirect=True)
def test_a_process_of_this_user_or_below_this_one_is_the_commands(daemon: MachineDaemon, sleeping: int) -> None:
    assert is_near(sleeping)
    assert daemon._is_ours(sleeping)


@pytest.mark.parametrize("sleeping", [(AWAY, NOBODY)], indirect=True)
def test_of_another_users_process_nothing_is_read_that_it_could_keep_locked(
    daemon: MachineDaemon, sleeping: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its environment lies in its memory, and a fault that waits for FUSE locks that."""
    read: list[str] = []
    original = Path.read_bytes

    def noting(path: Path) -> bytes:
        read.append(path.name)
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", noting)
    assert not daemon._is_ours(sleeping)
    assert set(read) == {"status"}
