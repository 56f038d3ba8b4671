"""A process whose memory somebody serves, and does not, holds nobody up for long."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.agent.preload import compile_c

SAMEPAGE = """
import sys
from samepage import inject
for _ in range(2):
    try:
        inject.make_calls(int(sys.argv[1]), [(39,)])
    except inject.InjectError as e:
        print(e.error.name)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: an own userfaultfd that also holds the kernel up")
def test_a_process_whose_code_never_comes_is_given_up(tmp_path: Path) -> None:
    program = compile_c(Path(__file__).with_name("unserved.c"), tmp_path / "unserved")
    process = subprocess.Popen([str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        began = time.monotonic()
        command = [sys.executable, "-c", SAMEPAGE, str(process.pid)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, "STUCK\nSTUCK\n", "")
        assert time.monotonic() - began < 40
        process.communicate("", timeout=10)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()
