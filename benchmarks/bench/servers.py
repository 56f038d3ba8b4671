"""Servers whose answers are timed while their memory is merged, and the client that times them.

    python -m benchmarks.bench.servers redis SOCKET MIB     redis-server with values of 4 KB
    python -m benchmarks.bench.servers model SOCKET MIB     a model behind HTTP that sums up rows of a table
    python -m benchmarks.bench.servers client SOCKET MIB KIND LIBRARY

A server says on stdout when it is ready. Two of a kind have the same memory. If $BENCH_MERGEABLE is set, a server asks
the kernel to merge all of it (prctl(2)).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import socket
import socketserver
import sys
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench.process import PAGE_SIZE, Worker, WriterState, anonymous

MERGEABLE = "BENCH_MERGEABLE"
PR_SET_MEMORY_MERGE = 67
VALUE = 4000
"""Bytes of a value of redis's, which jemalloc puts on a page of its own (where it puts values of 16 KiB and more within
a page is random);"""
PLACE = 2000
"""where in it its key stands once more, to be written there again."""
LOOKED_UP = 32
"""Rows of the model's table, a page each, that one answer is made of."""


@dataclass(frozen=True)
class Kind:
    """What is asked of a server."""

    questions: tuple[tuple[str, int, int], ...]
    """Each with the number of a key in it, the size of the answer, and once in how many it is asked."""
    gap_ns: int
    """From one question to the next."""
    key_bytes: int
    """How much memory a key has."""


def _redis(*words: str) -> str:
    """A command in redis's protocol."""
    sized = [f"${len(word % 0 if '%' in word else word)}\r\n{word}\r\n" for word in words]
    return f"*{len(words)}\r\n" + "".join(sized)


KINDS = {
    "redis": Kind(
        (
            (_redis("GETRANGE", "key:%06u", "3000", "3063"), 71, 1),
            (_redis("SETRANGE", "key:%06u", str(PLACE), "%06u"), 7, 10),
        ),
        gap_ns=1_000_000,
        key_bytes=PAGE_SIZE,
    ),
    "model": Kind((("GET /%06u HTTP/1.1\r\nHost: model\r\n\r\n", 103, 1),), gap_ns=1_000_000, key_bytes=PAGE_SIZE),
}


class _Question(ctypes.Structure):
    """struct question of client.c."""

    _fields_ = (("format", ctypes.c_char_p), ("answer_size", ctypes.c_uint64), ("every", ctypes.c_uint64))


class Client(Worker):
    """Asks questions in a thread of C (client.c, compiled to `library`) and records how long answers take."""

    def __init__(self, path: str, kind: Kind, keys: int, library: str) -> None:
        self._socket = _connected(path)
        questions = [_Question(text.encode(), size, every) for text, size, every in kind.questions]
        self._questions = (_Question * len(questions))(*questions)
        self._run = ctypes.CDLL(library).client_run
        self._thread = threading.Thread(target=self._ask, args=(keys, kind.gap_ns), daemon=True)
        self._state = WriterState()
        self._result: int | None = None
        self._thread.start()

    def _ask(self, keys: int, gap_ns: int) -> None:
        numbers = (ctypes.c_uint64(len(self._questions)), ctypes.c_uint64(keys), ctypes.c_uint64(gap_ns))
        self._result = self._run(self._socket.fileno(), self._questions, *numbers, ctypes.byref(self._state))

    def record(self, recording: bool) -> None:
        self._state.recording = recording

    def take(self) -> dict[str, Any]:
        """What was recorded since the last time: the longest in µs, and how many took so many whole µs. OSError when
        the server gave a wrong answer, or none."""
        if self._result is not None:
            raise OSError("the server answered wrongly")
        histogram = np.frombuffer(self._state.histogram, np.uint32)
        took = np.flatnonzero(histogram)
        taken = {
            "longest_us": self._state.longest_ns / 1000,
            "histogram_us": [took.tolist(), histogram[took].tolist()],
        }
        histogram[:] = 0
        self._state.longest_ns = 0
        return taken


def _connected(path: str) -> socket.socket:
    """To a server that may not be there yet. TimeoutError."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        connection = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            connection.connect(path)
            return connection
        connection.close()
        time.sleep(0.01)
    raise TimeoutError(f"nobody listens at {path}")


def _fill_redis(path: str, keys: int) -> None:
    connection = _connected(path)
    for key in range(keys):
        value = bytearray(random.Random(key).randbytes(VALUE))
        value[PLACE : PLACE + 6] = b"%06u" % key
        connection.sendall(b"*3\r\n$3\r\nSET\r\n$10\r\nkey:%06u\r\n$%u\r\n%s\r\n" % (key, VALUE, value))
        if connection.recv(64) != b"+OK\r\n":
            raise OSError("redis took no value")


def redis(path: str, mib: int) -> None:
    """Become redis-server; a child fills it."""
    if not os.fork():
        _fill_redis(path, (mib << 20) // PAGE_SIZE)
        print('"ready"', flush=True)
        os._exit(0)
    options = {"port": "0", "unixsocket": path, "save": "", "dir": str(Path(path).parent), "logfile": "redis.log"}
    os.execvp("redis-server", ["redis-server", *(word for k, v in options.items() for word in (f"--{k}", v))])


class _ModelHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    table: np.ndarray[Any, np.dtype[np.float32]]
    weights: np.ndarray[Any, np.dtype[np.float32]]

    def do_GET(self) -> None:
        rows = (int(self.path[1:]) * 7919 + np.arange(LOOKED_UP) * 1009) % len(self.table)
        result = self.table[rows].mean(0) @ self.weights
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 64\r\n\r\n" + result[:8].tobytes().hex().encode())


class _ModelServer(socketserver.UnixStreamServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client has gone in the middle of a question: it is told nothing of when it ends."""


def model(path: str, mib: int) -> None:
    """Serve a table of that size to one connection after the other."""
    words = anonymous((mib << 20) // PAGE_SIZE)
    words[:] = np.random.default_rng(1).integers(0, 1 << 30, words.shape, np.uint64)
    _ModelHandler.table = words.view(np.float32)
    _ModelHandler.weights = np.random.default_rng(2).random((PAGE_SIZE // 4, 64), np.float32)
    with _ModelServer(path, _ModelHandler) as server:
        print('"ready"', flush=True)
        server.serve_forever()


def main() -> None:
    what, path, mib, *more = sys.argv[1:]
    if os.environ.get(MERGEABLE) and ctypes.CDLL(None, use_errno=True).prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_MEMORY_MERGE")
    if what == "client":
        kind = KINDS[more[0]]
        Client(path, kind, (int(mib) << 20) // kind.key_bytes, more[1]).serve()
    else:
        {"redis": redis, "model": model}[what](path, int(mib))


if __name__ == "__main__":
    main()
