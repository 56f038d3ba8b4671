"""Programs of musl, as in Alpine's images: the same library serves them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.agent.preload import ROOT, Preload, compile_c
from tests.agent.test_torture import storm

pytestmark = pytest.mark.skipif(shutil.which("musl-gcc") is None, reason="needs musl-gcc (Debian's musl-tools)")


def compile_with_musl(source: Path, program: Path) -> Path:
    """musl-gcc knows no headers of the kernel's; they are found behind its own."""
    headers = [f"-idirafter{folder}" for folder in ("/usr/include", f"/usr/include/{os.uname().machine}-linux-gnu")]
    return compile_c(source, program, "-pthread", *headers, compiler="musl-gcc")


def test_no_byte_is_wrong_in_a_program_of_musl(preload: Preload, tmp_path: Path) -> None:
    program = compile_with_musl(ROOT / "tests" / "agent" / "torture.c", tmp_path / "torture")
    tally = storm(preload, tmp_path, [], [str(program), "8", str(tmp_path), "3"], 8)
    if "joined as MOVE" not in tally:
        pytest.skip("this kernel or user offers no such swap")
    assert tally["merge DONE"] > 500, "hardly anything was merged, so nothing was tested"
    assert tally["merge DIFFERENT"] > 50, "no writer was met on the way, so nothing was tested"
    assert not [k for k in tally if k.startswith("left") and ("nonsense" in k or "time" in k)], tally


def test_a_program_of_musl_runs_as_ever_where_there_is_no_service(preload: Preload, tmp_path: Path) -> None:
    program = compile_with_musl(ROOT / "tests" / "agent" / "torture.c", tmp_path / "torture")
    assert "fork" in preload.run([str(program), "1", str(tmp_path), "3"], socket="/nowhere")
