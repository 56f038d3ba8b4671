"""A process is served by one engine: the kernel's, or the agent's."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from samepage import agent
from tests.kernel.conftest import needs_ksm

LOOK = (
    "open('/proc/self/ksm_stat').read().partition('ksm_merge_any: ')[2].partition('\\n')[0], libc.prctl(68, 0, 0, 0, 0)"
)
SET = "import ctypes, os, sys; libc = ctypes.CDLL(None); libc.prctl(67, 1, 0, 0, 0)"


@needs_ksm
@pytest.mark.parametrize(("engine", "kernel"), [("auto", "no"), ("user", "yes"), ("", "yes")])
def test_what_is_mergeable_in_a_process_with_the_agent_is_the_agents_and_not_the_kernels(
    engine: str, kernel: str
) -> None:
    look = f"import ctypes; libc = ctypes.CDLL(None); print({LOOK})"
    again = f"{SET}; print({LOOK})"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SAMEPAGE_")}
    environment |= {"SAMEPAGE_SOCKET": "/nowhere"} | ({"SAMEPAGE_ENGINE": engine} if engine else {})
    loaded = environment | {"LD_PRELOAD": str(agent.library_path())}

    def said(program: str, **more: str) -> str:
        return subprocess.check_output([sys.executable, "-c", program], env=environment | more, text=True)

    execute = f"{SET}; os.execve(sys.executable, ['python', '-c', {look!r}], {loaded!r})"
    assert said(execute) == f"{kernel} 1\n"  # as it was inherited
    assert said(again, LD_PRELOAD=loaded["LD_PRELOAD"]) == f"{kernel} 1\n"  # as it asks for it
    assert said(again) == "yes 1\n"
