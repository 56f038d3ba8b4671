"""Closing sockets of peers without waiting for what a peer left in them."""

from __future__ import annotations

import ctypes
import socket
import threading

CLONE_FILES = 0x400

_libc = ctypes.CDLL(None)


def close_all(socks: list[socket.socket]) -> list[socket.socket]:
    """Close sockets now. Returns those that could not be: there is no thread to be had, so try again later.

    A descriptor left in a socket is closed with it, and if that is a socket with SO_LINGER, closing waits; except in a
    thread that is about to end. So one takes references of its own to all there is, we close ours, and it ends.
    """
    taken, closed = threading.Event(), threading.Event()
    outcome: list[int] = []

    def hold() -> None:
        outcome.append(_libc.unshare(CLONE_FILES))
        taken.set()
        closed.wait()

    try:
        threading.Thread(target=hold, daemon=True).start()
    except RuntimeError:
        return socks
    taken.wait()
    if outcome[0] == 0:
        for sock in socks:
            sock.close()
    closed.set()
    return socks if outcome[0] else []


def close_one(sock: socket.socket) -> None:
    """The same for one; if it cannot be had, wait."""
    if close_all([sock]):
        sock.close()
