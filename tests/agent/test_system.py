"""What the agent has in place of libc's functions does as those do."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

from tests.agent.preload import SOURCES, WARNINGS, compile_c

NAMES = ["memcpy", "memmove", "memset", "memcmp", "memchr", "strlen", "stpcpy", "strcpy", "strncmp", "strcmp"]
NAMES += ["strchrnul", "strchr", "strrchr", "strstr", "strsep", "strtoul"]


def own_functions(folder: Path, level: str, machine: str, tools: str) -> Path:
    """A program that compares those of system.c and memory.c with libc's."""
    objects = []
    for source in (SOURCES / "base" / "system.c", SOURCES / "arch" / machine / "memory.c"):
        objects.append(str(folder / f"{source.stem}.o"))
        command = [f"{tools}gcc", "-std=gnu11", *WARNINGS, level, "-c", "-fPIC", f"-I{SOURCES}", str(source)]
        subprocess.run([*command, "-o", objects[-1]], check=True)
        symbols = [f"--redefine-sym={name}=own_{name}" for name in NAMES]
        subprocess.run([f"{tools}objcopy", *symbols, objects[-1]], check=True)
    source = Path(__file__).with_name("system_probe.c")
    return compile_c(source, folder / "probe", *objects, compiler=f"{tools}gcc")


def test_memory_and_text_are_handled_as_by_libc(tmp_path: Path) -> None:
    """Optimised as in the library: a compiler may take such a function's body for a call of the function."""
    for level in ("-O0", "-O2", "-O3"):
        probe = own_functions(tmp_path, level, platform.machine(), "")
        done = subprocess.run([str(probe)], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (0, "the same\n")
