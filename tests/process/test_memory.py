"""How much memory a process has had, also while it ends, and without its first thread."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.processes import wait_until
from samepage.process.identity import has_ended, memory_of

WITHOUT_ITS_FIRST_THREAD = """
import ctypes, sys, threading, time
held = bytearray(b"x") * (40 << 20)
threading.Thread(target=time.sleep, args=(1000,)).start()
print("ready", flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""


def test_what_a_process_without_its_first_thread_has_is_told() -> None:
    with subprocess.Popen([sys.executable, "-c", WITHOUT_ITS_FIRST_THREAD], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            status = Path(f"/proc/{process.pid}/status")
            wait_until(lambda: b"Vm" not in status.read_bytes(), "without its first thread", 60, every=0.01)
            assert memory_of(process.pid) > 40 << 10
        finally:
            process.kill()


def test_a_process_that_has_no_memory_any_more_has_ended() -> None:
    with subprocess.Popen(["true"]) as process:
        wait_until(lambda: has_ended(process.pid), "ended", 60, every=0.01)
        with pytest.raises(ProcessLookupError):
            memory_of(process.pid)
