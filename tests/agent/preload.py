"""Running programs with the agent preloaded, built from the sources as they are."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src" / "samepage" / "agent"
WARNINGS = ["-O2", "-Wall", "-Wextra", "-Werror"]


SANITIZERS = {
    "": [],
    "undefined": [
        "-g",
        "-fsanitize=undefined,float-divide-by-zero,float-cast-overflow",
        "-fsanitize-undefined-trap-on-error",
        "-Wno-builtin-declaration-mismatch",  # sanitizer.c declares what gcc then knows
    ],
}
"""How `$SAMEPAGE_SANITIZE` has the agent built. What is undefined ends the process by SIGILL: no runtime is there."""


def compile_c(source: Path, program: Path, *flags: str, compiler: str = "gcc", standard: str = "gnu11") -> Path:
    """Compile one file; returns `program`."""
    subprocess.run([compiler, f"-std={standard}", *WARNINGS, str(source), "-o", str(program), *flags], check=True)
    return program


def sources(machine: str) -> list[str]:
    """All that the agent is made of on such a machine."""
    return [*map(str, sorted([*SOURCES.glob("*/*.c"), *(SOURCES / "arch" / machine).glob("*.c")]))]


def build_agent(directory: Path, *more: str, compiler: str = "gcc", machine: str = platform.machine()) -> Path:
    """libsamepage.so in `directory`, with the flags of meson.build, and `more`."""
    library = directory / "libsamepage.so"
    flags = [f"-I{SOURCES}", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-builtin-malloc", "-fno-builtin-calloc"]
    flags += [
        "-ftls-model=initial-exec",
        "-Wl,-z,now",
        "-pthread",
        *SANITIZERS[os.environ.get("SAMEPAGE_SANITIZE", "")],
    ]
    command = [compiler, "-std=gnu11", *WARNINGS, *flags, *more, *sources(machine), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


@dataclass(frozen=True)
class Preload:
    """`library` is libsamepage.so, `merge_all` the socket of a service that merges every page."""

    library: Path
    merge_all: str

    def run(
        self, command: list[str], *, bare: bool = False, merged: bool = False, socket: str = "", **environment: str
    ) -> str:
        """Run a program that must succeed, under the agent unless `bare`; returns what it printed."""
        env = {k: v for k, v in os.environ.items() if not k.startswith("SAMEPAGE_")} | environment
        # A user's own Python packages, and nothing that was not there when the tests began.
        env["PYTHONPATH"] = str(Path(np.__file__).parents[1])
        if not bare:
            env["LD_PRELOAD"] = str(self.library)
        if merged or socket:
            env["SAMEPAGE_SOCKET"] = self.merge_all if merged else socket
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, f"{command[0]}: {done.returncode}\n{done.stdout}{done.stderr}"
        assert done.stderr == ""
        return done.stdout


def start_merge_all(path: Path) -> subprocess.Popen[str]:
    """tests/agent/merge_all.py, listening at `path`."""
    command = [sys.executable, str(ROOT / "tests" / "agent" / "merge_all.py"), str(path)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *filter(None, sys.path)])}
    service = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert service.stdout is not None
    assert service.stdout.readline() == "listening\n"
    return service
