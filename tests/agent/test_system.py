"""What the agent has in place of libc's functions does as those do."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.agent.preload import SOURCES, WARNINGS, compile_c

NAMES = ["memcpy", "memmove", "memset", "memcmp", "memchr", "strlen", "stpcpy", "strcpy", "strncmp", "strcmp"]
NAMES += ["strchrnul", "strchr", "strrchr", "strstr", "strsep", "strtoul"]


def test_memory_and_text_are_handled_as_by_libc(tmp_path: Path) -> None:
    """Optimised as in the library: a compiler may take such a function's body for a call of the function."""
    plain, renamed = tmp_path / "plain.o", tmp_path / "renamed.o"
    for level in ("-O0", "-O2", "-O3"):
        source = str(SOURCES / "base" / "system.c")
        command = ["gcc", "-std=gnu11", *WARNINGS, level, "-c", "-fPIC", f"-I{SOURCES}", source, "-o", str(plain)]
        subprocess.run(command, check=True)
        symbols = [f"--redefine-sym={name}=own_{name}" for name in NAMES]
        subprocess.run(["objcopy", *symbols, str(plain), str(renamed)], check=True)
        probe = compile_c(Path(__file__).with_name("system_probe.c"), tmp_path / "probe", str(renamed))
        done = subprocess.run([str(probe)], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (0, "the same\n")
