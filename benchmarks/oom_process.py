"""A process of benchmarks/oom.py and tests/oom: does as it is told on stdin, one JSON object a line, and answers so.

    python oom_process.py worker MIB PART_MIB    memory that repeats a part of itself, to be merged and unmerged
    python oom_process.py neighbour GROUP        fills its memory cgroup up to the limit and empties it, for ever

A worker holds no second copy of what it wrote, since that would be charged too: it keeps a checksum for each MiB.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import random
import signal
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

MIB = 1 << 20
MADV_POPULATE_WRITE = 23


class Worker:
    """`mib` MiB of private memory, the same `part_mib` random ones over and over."""

    def __init__(self, mib: int, part_mib: int) -> None:
        self._memory = mmap.mmap(-1, mib * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # In pieces too small for the agent to serve, so that this is all there is to merge.
        source, piece = random.Random(part_mib), 128 << 10
        for at in range(0, part_mib * MIB, piece):
            content = source.randbytes(piece)
            for start in range(at, mib * MIB, part_mib * MIB):
                self._memory[start : start + piece] = content
        self._sums = [self._sum(i) for i in range(mib)]
        self._region: Any = None

    def _sum(self, i: int) -> int:
        with memoryview(self._memory) as view, view[i * MIB : (i + 1) * MIB] as part:
            return zlib.crc32(part)

    def advise(self) -> None:
        """MADV_MERGEABLE: samepage's where the agent is loaded, else the kernel's."""
        self._memory.madvise(mmap.MADV_MERGEABLE)

    def register(self) -> None:
        """The same with the Python API."""
        import samepage

        self._region = samepage.register(self._memory)

    def write(self, page: int) -> None:
        """Change one byte, which breaks that page."""
        self._memory[page * mmap.PAGESIZE] ^= 1
        self._sums[page * mmap.PAGESIZE // MIB] = self._sum(page * mmap.PAGESIZE // MIB)

    def madvise(self) -> dict[str, Any]:
        """MADV_UNMERGEABLE."""
        return self._timed(lambda: self._memory.madvise(mmap.MADV_UNMERGEABLE))

    def region(self) -> dict[str, Any]:
        """Region.unmerge."""
        return self._timed(self._region.unmerge) | {"registered": self._region.registered}

    def interrupted(self, raising: bool, first: float, every: float) -> dict[str, Any]:
        """Region.unmerge with a handler for SIGALRM that returns or raises."""
        ran = []

        def handler(*_: object) -> None:
            ran.append(time.monotonic())
            if raising:
                raise InterruptedError(errno.EINTR, "the handler")

        before = signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, first, every)
        try:
            answer = self.region()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        return answer | {"handled": len(ran), "after": time.monotonic() - ran[-1] if ran else None}

    def verify(self) -> bool:
        """Whether every byte is what it should be."""
        return self._sums == [self._sum(i) for i in range(len(self._sums))]

    def discard(self) -> None:
        """MADV_DONTNEED: the memory is given back, and reads as zeros."""
        self._memory.madvise(mmap.MADV_DONTNEED)
        self._sums = [zlib.crc32(bytes(MIB))] * len(self._sums)

    def _timed(self, unmerge: Callable[[], None]) -> dict[str, Any]:
        started = time.perf_counter()
        answer: dict[str, Any] = {"errno": None}
        try:
            unmerge()
        except OSError as e:
            answer = {"errno": errno.errorcode[e.errno or 0]}
            for name in ("pages_unmerged", "pages_remaining", "bytes_needed", "bytes_available"):
                if hasattr(e, name):
                    answer[name] = getattr(e, name)
        return answer | {"seconds": time.perf_counter() - started}

    def serve(self) -> None:
        """Answer until stdin ends."""
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            print(json.dumps(getattr(self, name)(*arguments)), flush=True)


class Neighbour:
    """Takes what its cgroup has left, down to `MARGIN`, and gives it all back.

    It looks before every step, so that two of them alone never go over the limit: between the look and the step each
    can be overtaken by a charge of the other's and of both workers', be it for a file that they open, and the kernel
    charges 256 KiB ahead. That fits into the margin. A batch of an unmerge does not.
    """

    STEP = 32 << 10
    MARGIN = 4 * (256 << 10) + 2 * STEP

    def __init__(self, group: str) -> None:
        v1 = os.path.exists(f"{group}/memory.limit_in_bytes")
        self._usage = os.open(f"{group}/memory.{'usage_in_bytes' if v1 else 'current'}", os.O_RDONLY)
        self._limit = os.open(f"{group}/memory.{'limit_in_bytes' if v1 else 'max'}", os.O_RDONLY)
        self._memory = mmap.mmap(-1, 1 << 30, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._taken = 0

    def run(self) -> None:
        """Until killed. Every byte on stdout is one time that the cgroup was full."""
        random.seed(os.getpid())
        os.set_blocking(1, False)
        while True:
            limit = int(os.pread(self._limit, 32, 0))
            if limit - int(os.pread(self._usage, 32, 0)) >= self.MARGIN and self._taken < len(self._memory):
                self._memory.madvise(MADV_POPULATE_WRITE, self._taken, self.STEP)
                self._taken += self.STEP
                continue
            if self._taken >= MIB:
                with contextlib.suppress(BlockingIOError):
                    os.write(1, b".")
            self._memory.madvise(mmap.MADV_DONTNEED)
            self._taken = 0
            time.sleep(random.random() * 0.01)


def main() -> None:
    if sys.argv[1] == "worker":
        worker = Worker(int(sys.argv[2]), int(sys.argv[3]))
        print(json.dumps("ready"), flush=True)
        worker.serve()
    else:
        Neighbour(sys.argv[2]).run()


if __name__ == "__main__":
    main()
