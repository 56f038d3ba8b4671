"""Programs that must hear of each unmap, as MPI libraries must, hear of it."""

from __future__ import annotations

import ctypes.util
import os
import platform
import subprocess
from pathlib import Path

import pytest

from tests.agent.preload import ROOT, Preload, compile_c

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="it writes code of x86-64")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_c(
        ROOT / "tests" / "agent" / "watched.c",
        tmp_path_factory.mktemp("watched") / "watched",
        "-ldl",
        "-Wno-use-after-free",
    )


def run(preload: Preload, command: list[str], **environment: str) -> tuple[int, str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("SAMEPAGE_")} | environment
    env["LD_PRELOAD"] = str(preload.library)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("memory", ["large", "mapped", "all"])
@pytest.mark.parametrize("when", [[], ["later"]], ids=["at once", "after pages were merged"])
def test_who_jumps_from_libcs_unmaps_hears_of_all(
    preload: Preload, program: Path, memory: str, when: list[str]
) -> None:
    command = [str(program), "own", *when]
    status, out, errors = run(preload, command, SAMEPAGE_SOCKET=preload.merge_all, SAMEPAGE_MEMORY=memory)
    assert (status, out) == (0, "")
    assert errors == "samepage: watched watches its memory (MPI), and is left alone\n"


def test_without_a_service_nothing_is_said(preload: Preload, program: Path) -> None:
    assert run(preload, [str(program), "own"]) == (0, "", "")


def test_ucx_hears_of_all(preload: Preload, program: Path) -> None:
    if not ctypes.util.find_library("ucm"):
        pytest.skip("needs libucx0")
    status, out, _ = run(preload, [str(program), "ucx", "later"], SAMEPAGE_SOCKET=preload.merge_all)
    assert (status, out) == (0, "")
