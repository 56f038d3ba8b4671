"""A small HTTP server for metrics. Anybody may connect, and must not be able to keep others waiting.

It uses one thread and few descriptors. A silent connection takes one of these for `PATIENCE` seconds, and makes room
sooner if others come. Connections are accepted one by one, `PACE` seconds apart, so that a flood of them takes little
of the interpreter from ksmd.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Callable
from http import HTTPStatus

from samepage.service import sockets
from samepage.service.log import log_once
from samepage.service.sockets import ControlError

PATIENCE = 5.0
"""Seconds that a connection may take in all."""

OPEN_MAX = 16
"""The most connections at a time; one more closes the oldest."""

HEAD_MAX = 8192
"""The most bytes of a request."""

PACE = 0.01
"""Seconds between two connections."""

FRESH = 0.5
"""For how many seconds collected metrics are reused for others."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def listen(address: str) -> socket.socket:
    """A listening socket at HOST:PORT, at PORT of the loopback address, or a Unix socket of this user alone at a path.
    ControlError."""
    if "/" in address:
        return sockets.listen(address, kind=socket.SOCK_STREAM)
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") or "127.0.0.1"
    try:
        if not 0 <= int(port) < 1 << 16:
            raise ValueError(f"{port} is no port")
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, where = found[0]
        return socket.create_server(where[:2], family=family, backlog=OPEN_MAX)
    except (OSError, ValueError, OverflowError) as e:
        why = getattr(e, "strerror", None) or str(e)
        raise ControlError(
            getattr(e, "errno", None) or errno.EINVAL, f"cannot listen at {address} for metrics: {why}"
        ) from e


class Exposition:
    """Serves `/metrics` at `listener`, which it takes over, in a thread of its own until `stop`."""

    def __init__(self, listener: socket.socket, render: Callable[[], bytes]) -> None:
        self._listener = listener
        self._listener.setblocking(False)
        self._render = render
        self._made, self._body = -FRESH, b""
        self._open: dict[asyncio.Task[None], None] = {}  # the oldest first
        self._loop = asyncio.new_event_loop()
        self._accepting = self._loop.create_task(self._accept())
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and close what is open."""
        self._loop.call_soon_threadsafe(self._accepting.cancel)
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._accepting)
        if left := list(self._open):
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.wait(left))
        self._listener.close()
        self._loop.close()

    async def _accept(self) -> None:
        while True:
            try:
                sock, _ = await self._loop.sock_accept(self._listener)
            except OSError as e:
                log_once("metrics", f"cannot take a connection for metrics: {e.strerror}")
            else:
                if len(self._open) >= OPEN_MAX:
                    next(iter(self._open)).cancel()
                task = self._loop.create_task(self._serve(sock))
                self._open[task] = None
                task.add_done_callback(self._open.pop)
            await asyncio.sleep(PACE)

    async def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError, TimeoutError):
            sock.setblocking(False)
            async with asyncio.timeout(PATIENCE):
                head = b""
                while b"\r\n\r\n" not in head:
                    data = await self._loop.sock_recv(sock, HEAD_MAX)
                    head += data
                    if not data or len(head) > HEAD_MAX:
                        return
                try:
                    answer = self._answer(head)
                except Exception as e:  # a defect of ours must not end this; the client gets an error
                    log_once("metrics", f"a mistake of the service's own, in metrics: {e!r}")
                    answer = _response(HTTPStatus.INTERNAL_SERVER_ERROR)
                await self._loop.sock_sendall(sock, answer)

    def _answer(self, head: bytes) -> bytes:
        words = head.partition(b"\r\n")[0].split(b" ")
        if len(words) != 3:
            return _response(HTTPStatus.BAD_REQUEST)
        method, target, _ = words
        if method not in (b"GET", b"HEAD"):
            return _response(HTTPStatus.METHOD_NOT_ALLOWED)
        if target.partition(b"?")[0] != b"/metrics":
            return _response(HTTPStatus.NOT_FOUND)
        body = self._collected()
        answer = _response(HTTPStatus.OK, body)
        return answer if method == b"GET" else answer[: -len(body)]

    def _collected(self) -> bytes:
        if time.monotonic() - self._made >= FRESH:
            self._body = self._render()
            self._made = time.monotonic()
        return self._body


def _response(status: HTTPStatus, body: bytes = b"") -> bytes:
    body = body or f"{status.value} {status.phrase}\n".encode()
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + body


def remove(address: str) -> None:
    """Remove the file of a Unix socket."""
    if "/" in address:
        with contextlib.suppress(OSError):
            os.unlink(address)
