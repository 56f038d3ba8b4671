"""A process of the benchmark: holds the memory that is merged, and works with it, as it is told on stdin.

    python -m benchmarks.bench.process memory RUNS     pages whose content follows from a number each
    python -m benchmarks.bench.process model FOLDER    all-MiniLM-L6-v2, loaded as examples/minilm.py does
    python -m benchmarks.bench.process shared NAME     the same pages in multiprocessing.shared_memory
    python -m benchmarks.bench.process mapped FILE     and in a file that is mapped

An ordinary program: whether its pages are merged, and by whom, it does not know, but for `advise`, by which a program
asks the kernel for it. Times are those of CLOCK_MONOTONIC, which is the same in all processes.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import threading
import time
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Run = tuple[int, int, int]
"""Pages: the number of the first, how many there are, and (unless 0) the size of blocks that are put in disorder."""

PAGE_SIZE = mmap.PAGESIZE
WORDS = PAGE_SIZE // 8
CHUNK = 4096
"""Pages worked on at a time: temporaries stay smaller than what the agent takes for its own (1 MiB)."""

REDUCED_PAGES = 1024
"""Pages summed up by one step of the application (4 MiB)."""

WRITTEN = 4096
"""Words written, each on a page at random, by one step of the application."""

WRITER_GAP_NS = 50_000
"""From one touch of the writer to the next: 20,000 pages a second, for what it touches is merged no more."""


def numbers(runs: list[Run]) -> npt.NDArray[np.uint32]:
    """The number of every page. Disorder is the same in every process that asks for it."""
    parts = []
    for first, npages, block in runs:
        part = np.arange(first, first + npages, dtype=np.uint32)
        if block:
            np.random.default_rng(npages).shuffle(part.reshape(-1, block))
        parts.append(part)
    return np.concatenate(parts)


def fill(words: Words, number: npt.NDArray[np.uint32]) -> None:
    """Write pages: equal where their numbers are, different in every word where they are not, and none of zeros."""
    within = np.arange(1, WORDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for start in range(0, len(words), CHUNK):
        of_page = number[start : start + CHUNK].astype(np.uint64) * np.uint64(0xD1342543DE82EF95)
        np.add(of_page[:, None], within[None, :], out=words[start : start + CHUNK])


def anonymous(npages: int) -> Words:
    """Uninitialised pages. With the agent an array as numpy makes it, which lies on pages of its own; without, where
    an array begins 16 bytes into a page, a mapping."""
    if "libsamepage" in os.environ.get("LD_PRELOAD", ""):
        return np.empty((npages, WORDS), np.uint64)
    memory = mmap.mmap(-1, npages * PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, np.uint64).reshape(npages, WORDS)


def advise(array: npt.NDArray[Any]) -> int:
    """The kernel's MADV_MERGEABLE for the pages that lie wholly within an array; returns how many."""
    start = -(-array.ctypes.data // PAGE_SIZE)
    npages = (array.ctypes.data + array.nbytes) // PAGE_SIZE - start
    if npages > 0:
        libc = ctypes.CDLL(None, use_errno=True)
        address, size = ctypes.c_void_p(start * PAGE_SIZE), ctypes.c_size_t(npages * PAGE_SIZE)
        if libc.madvise(address, size, mmap.MADV_MERGEABLE):
            raise OSError(ctypes.get_errno(), "MADV_MERGEABLE")
    return max(0, npages)


PR_SET_MEMORY_MERGE = 67
"""include/uapi/linux/prctl.h (Linux 6.4)."""


class Application(threading.Thread):
    """Sums up the pages of `read`, 4 MiB at a time, and in turn writes to pages at random of `written`; notes when."""

    def __init__(self, read: Words, written: Words) -> None:
        super().__init__(daemon=True)
        self._read, self._written = read, written
        self._stopping = False
        self.steps: list[tuple[float, float, float]] = []
        """When a sum began, when it was done and writing began, and when that was done."""

    def run(self) -> None:
        chance = np.random.default_rng(1)
        at = 0
        while not self._stopping:
            pages = chance.integers(0, len(self._written), WRITTEN)
            started = time.perf_counter()
            self._read[at : at + REDUCED_PAGES].sum()
            summed = time.perf_counter()
            self._written[pages, pages % WORDS] += np.uint64(2)
            self.steps.append((started, summed, time.perf_counter()))
            at = (at + REDUCED_PAGES) % len(self._read)

    def stop(self) -> list[tuple[float, float, float]]:
        self._stopping = True
        self.join()
        return self.steps


class WriterState(ctypes.Structure):
    """struct writer of writer.c."""

    BUCKETS = 20_000
    _fields_ = (
        ("stop", ctypes.c_int),
        ("recording", ctypes.c_int),
        ("longest_ns", ctypes.c_uint64),
        ("histogram", ctypes.c_uint32 * BUCKETS),
    )


class Writer(threading.Thread):
    """Touches pages at random and measures how long each write takes (writer.c, compiled to `library`), on a CPU of its
    own and before others there, as far as this user may have that."""

    def __init__(self, library: str, pages: Words, cpu: int) -> None:
        super().__init__(daemon=True)
        self._run = ctypes.CDLL(library).writer_run
        self._pages, self._cpu = pages, cpu
        self.state = WriterState()

    def run(self) -> None:
        os.sched_setaffinity(0, {self._cpu})
        if os.geteuid() == 0:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(2))
        self._run(
            ctypes.c_void_p(self._pages.ctypes.data),
            ctypes.c_uint64(len(self._pages)),
            ctypes.c_uint64(WRITER_GAP_NS),
            ctypes.byref(self.state),
        )

    def stop(self) -> dict[str, Any]:
        """What it recorded: touches, the longest in µs, and how many took so many whole µs."""
        self.state.stop = 1
        self.join()
        histogram = np.frombuffer(self.state.histogram, np.uint32)
        took = np.flatnonzero(histogram)
        return {
            "touches": int(histogram.sum()),
            "longest_us": self.state.longest_ns / 1000,
            "histogram_us": [took.tolist(), histogram[took].tolist()],
        }


class Rewriter(threading.Thread):
    """Gives pages a new content again and again: to all of them, so often."""

    def __init__(self, words: Words, pages: npt.NDArray[np.int64], every: float) -> None:
        super().__init__(daemon=True)
        self._words, self._pages, self._every = words, pages, every

    def run(self) -> None:
        while True:
            self._words[self._pages, 1] += np.uint64(1)
            time.sleep(self._every)


class Worker:
    """What all workers can be told."""

    def serve(self) -> None:
        """Say that it is ready, and answer until stdin ends."""
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            print(json.dumps(getattr(self, name)(*arguments)), flush=True)


class Memory(Worker):
    """Pages whose content follows from their numbers. The last sixteenth is what the application writes to."""

    def __init__(self, runs: list[Run]) -> None:
        number = numbers(runs)
        self._number = number
        self._words = anonymous(len(number))
        fill(self._words, number)
        self._chance = np.random.default_rng(os.getpid())
        self._application: Application | None = None
        self._writer: Writer | None = None

    def advise(self) -> int:
        """MADV_MERGEABLE for all of them."""
        return advise(self._words)

    def advise_all(self) -> None:
        """PR_SET_MEMORY_MERGE: the same for all memory of the process, and what it has later."""
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "PR_SET_MEMORY_MERGE")

    def address(self) -> int:
        """Of the first of them."""
        return self._words.ctypes.data

    def rewrite(self, share: float) -> int:
        """Give that share of the pages, at random, a new content; returns how many."""
        pages = self._chance.choice(len(self._words), round(share * len(self._words)), replace=False)
        self._words[pages, 1] += np.uint64(1 << 20)
        return len(pages)

    def rewrite_others(self, common: int, every: float) -> None:
        """From now on, rewrite every so many seconds all pages but those whose number is less than `common`."""
        Rewriter(self._words, np.flatnonzero(self._number >= common), every).start()

    def application_start(self) -> None:
        cut = len(self._words) - len(self._words) // 16
        self._application = Application(self._words[:cut], self._words[cut:])
        self._application.start()

    def application_stop(self) -> list[tuple[float, float, float]]:
        assert self._application is not None
        return self._application.stop()

    def writer_start(self, library: str, cpu: int) -> None:
        self._writer = Writer(library, self._words, cpu)
        self._writer.start()

    def writer_record(self, recording: bool) -> None:
        assert self._writer is not None
        self._writer.state.recording = recording

    def writer_stop(self) -> dict[str, Any]:
        assert self._writer is not None
        return self._writer.stop()


class Model(Worker):
    """The model of the demonstration."""

    def __init__(self, folder: str) -> None:
        from minilm import MiniLM

        self._model = MiniLM(Path(folder))

    def weight_bytes(self) -> int:
        return self._model.weight_bytes

    def advise(self) -> int:
        return sum(advise(weight) for weight in self._model.weights.values())

    def embed(self, sentence: str) -> str:
        """Of the embedding, the bytes."""
        return self._model.embed(sentence).tobytes().hex()


class ByHand(Worker):
    """Pages that a program shares with others because it was written so."""

    def __init__(self) -> None:
        self._words: Words | None = None
        self._keep: Any = None

    def attach(self) -> dict[str, float]:
        """Map the memory and read all of it; seconds of time and of this process's CPU."""
        started, cpu = time.perf_counter(), time.process_time()
        self._words = self._map()
        self._words[:, 0].sum()
        return {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}

    def _map(self) -> Words:
        raise NotImplementedError


class Shared(ByHand):
    """multiprocessing.shared_memory."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def _map(self) -> Words:
        self._keep = SharedMemory(self._name)
        # Before Python 3.13 who only attaches removes it at the end, too (bpo-38119).
        resource_tracker.unregister(f"/{self._name}", "shared_memory")
        return np.ndarray((self._keep.size // PAGE_SIZE, WORDS), np.uint64, self._keep.buf)


class Mapped(ByHand):
    """A file, mapped copy-on-write."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self._file = file

    def _map(self) -> Words:
        return np.memmap(self._file, np.uint64, "c").reshape(-1, WORDS)


def main() -> None:
    kind, what = sys.argv[1:]
    if kind == "memory":
        Memory(json.loads(what)).serve()
    else:
        {"model": Model, "shared": Shared, "mapped": Mapped}[kind](what).serve()


if __name__ == "__main__":
    main()
