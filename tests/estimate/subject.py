"""A process to be looked at: it does what it is told, in a mapping of its own, and says where that is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

from samepage.memory import PAGE_SIZE

# Reads lines of Python, runs each, and answers with the value of `out`.
PROGRAM = """
import ctypes, mmap, os, signal, sys, time
PAGE = 4096
def region(npages, huge=False, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS):
    memory = mmap.mmap(-1, npages * PAGE, flags)
    memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    memory.madvise(mmap.MADV_DONTDUMP)  # which its neighbours are not: so it stays a mapping of its own
    return memory
def address(memory):
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
def fill(memory, first, contents):
    for i, content in enumerate(contents):
        memory[(first + i) * PAGE : (first + i + 1) * PAGE] = content.to_bytes(8, "little") * (PAGE // 8)
out = os.getpid()
print(out, flush=True)
for line in sys.stdin:
    out = None
    exec(line)
    print(out, flush=True)
"""


class Subject:
    """The process. Use with `with`: it has ended afterwards."""

    def __init__(self, preexec: Callable[[], None] | None = None, command: tuple[str, ...] = ()) -> None:
        self._process = subprocess.Popen(
            [*command, sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=preexec,
        )
        self.pid = int(self._read())

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the subject has ended"
        return line.strip()

    def do(self, line: str) -> str:
        """Run a line of Python in it; the value it gives to `out`."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._read()

    def region(self, npages: int, name: str = "m", more: str = "") -> int:
        """Map `npages` pages there, nothing in them yet; the address."""
        return int(self.do(f"{name} = region({npages}{more}); out = address({name})"))

    def fill(self, first: int, contents: list[int], name: str = "m") -> None:
        """Write pages from the `first` on: each says its content, 0 is zeros."""
        self.do(f"fill({name}, {first}, {contents})")

    def send(self, line: str) -> None:
        """Run a line that nobody waits for the end of."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Subject:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._process.communicate()


def mapping_at(report: Any, pid: int, address: int) -> Any:
    """The mapping of a process in a report that has `address` in it."""
    (source,) = (source for source in report.sources if source.pid == pid)
    (mapping,) = (mapping for mapping in source.mappings if mapping.start <= address < mapping.end)
    return mapping


__all__ = ["PAGE_SIZE", "Subject", "mapping_at"]
