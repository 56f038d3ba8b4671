"""What depends on the processor is in one folder for each. On aarch64 the library can be built; an emulator of user
programs has no ptrace(2), so it was never run by one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.agent.preload import ROOT, SOURCES, WARNINGS

INJECT = ROOT / "src" / "samepage" / "inject"
REGISTER = re.compile(r"(?:->|\.)(?:orig_)?(?:r(?:[abcd]x|[sd]i|[sb]p|ip|\d+)|regs\[|pstate|x\d+)\b")


@pytest.mark.parametrize("compiler", ["gcc", "aarch64-linux-gnu-gcc"])
def test_the_library_is_complete_on_each_processor(tmp_path: Path, compiler: str) -> None:
    if not shutil.which(compiler):
        pytest.skip(f"needs {compiler}")
    machine = subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True, check=True).stdout
    parts = [*INJECT.glob("*.c"), INJECT / "arch" / machine.partition("-")[0] / "tracee.c", SOURCES / "kernel/memcg.c"]
    flags = ["-std=gnu11", *WARNINGS, f"-I{INJECT}", f"-I{SOURCES}", "-fPIC", "-shared", "-Wl,-z,defs"]
    command = [compiler, *flags, *map(str, parts), "-o", str(tmp_path / "library.so"), "-l:libpthread.so.0"]
    subprocess.run(command, check=True)


def test_no_file_outside_the_folder_of_a_processor_names_a_register() -> None:
    assert REGISTER.search("t->regs.rsp > m.start")
    for path in [*INJECT.glob("*.[ch]")]:
        assert not REGISTER.search(path.read_text()), path
