"""What depends on the processor is in one folder for each. For aarch64 it is only built here: an emulator of user
programs has no ptrace(2)."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.agent.preload import ROOT, SOURCES, WARNINGS, compile_c

HERE = Path(__file__).parent
INJECT = ROOT / "src" / "samepage" / "inject"
REGISTER = re.compile(r"(?:->|\.)(?:orig_)?(?:r(?:[abcd]x|[sd]i|[sb]p|ip|\d+)|regs\[|pstate|x\d+)\b")


COMPILERS = ["gcc", "aarch64-linux-gnu-gcc"]


def build(compiler: str, target: Path, *more: str) -> Path:
    """All of the library, and more."""
    if not shutil.which(compiler):
        pytest.skip(f"needs {compiler}")
    machine = subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True, check=True).stdout
    parts = [*INJECT.glob("*.c"), INJECT / "arch" / machine.partition("-")[0] / "tracee.c", SOURCES / "kernel/memcg.c"]
    flags = ["-std=gnu11", *WARNINGS, f"-I{INJECT}", f"-I{SOURCES}", *more]
    subprocess.run([compiler, *flags, *map(str, parts), "-o", str(target), "-l:libpthread.so.0"], check=True)
    return target


@pytest.mark.parametrize("compiler", COMPILERS)
def test_the_library_is_complete_on_each_processor(tmp_path: Path, compiler: str) -> None:
    build(compiler, tmp_path / "library.so", "-fPIC", "-shared", "-Wl,-z,defs")


@pytest.mark.parametrize("compiler", COMPILERS)
def test_the_programs_that_check_themselves_are_there_for_each_processor(tmp_path: Path, compiler: str) -> None:
    """And run where that is this one."""
    caller = build(compiler, tmp_path / "caller", str(HERE / "caller.c"))
    flags = ["-pthread", *(["-mavx", "-fno-stack-protector"] if compiler == "gcc" else [])]
    checked = compile_c(HERE / "checked.c", tmp_path / "checked", *flags, compiler=compiler)
    compile_c(HERE / "waits.c", tmp_path / "waits", "-pthread", compiler=compiler)
    if compiler == "gcc":
        for command in (["50", checked, "registers"], ["-k", "5", checked, "-e", "reading"]):
            done = subprocess.run(list(map(str, [caller, *command])), capture_output=True, text=True, timeout=60)
            assert (done.returncode, done.stderr) == (0, "")
            assert ", 0 refused, status 0" in done.stdout


def test_no_file_outside_the_folder_of_a_processor_names_a_register() -> None:
    assert REGISTER.search("t->regs.rsp > m.start")
    for path in [*INJECT.glob("*.[ch]")]:
        assert not REGISTER.search(path.read_text()), path
