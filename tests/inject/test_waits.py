"""A process that waits is held, and does not notice: whatever it waits in."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import pytest

from samepage import inject
from samepage.inject import Error, InjectError
from tests.agent.preload import compile_c

SOURCE = Path(__file__).with_name("waits.c")
KINDS = re.findall(r'^\t\{"([\w ]+)", \w+, \w+\},$', SOURCE.read_text(), re.MULTILINE)
ROUNDS = 10
SYS_GETPID, SYS_CLOSE = 39, 3
HAS_NO_RING = 77


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_c(SOURCE, tmp_path_factory.mktemp("waits") / "waits", "-pthread")


@pytest.mark.parametrize("kind", KINDS)
def test_a_wait_goes_on_until_what_is_waited_for_comes(program: Path, kind: str) -> None:
    pipe = subprocess.PIPE
    process = subprocess.Popen([str(program), kind], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.05)
        for _ in range(1 if kind == "vfork" else ROUNDS):
            try:
                assert inject.make_calls(process.pid, [(SYS_GETPID,), (SYS_CLOSE, 12345)])[:1] == [process.pid]
            except InjectError as e:
                # The kernel lets nobody stop a process that waits for the child of a vfork.
                assert (kind, e.error) == ("vfork", Error.SILENT)  # noqa: PT017
            time.sleep(0.002)
        assert process.poll() is None
        _, errors = process.communicate("x", timeout=20)
    finally:
        process.kill()
        process.communicate()
    if process.returncode == HAS_NO_RING:
        pytest.skip("this kernel gives nobody an io_uring")
    assert (process.returncode, errors) == (0, "")
