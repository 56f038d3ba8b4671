"""A service that merges every page of every process with a copy of itself, at once and for ever.

It saves nothing; but whatever a program does with its memory, it does to merged pages.

    python merge_all.py SOCKET

Prints a line when it listens, serves until SIGTERM.
"""

from __future__ import annotations

import socket
import struct
import sys
import threading
import time

import numpy as np

from samepage.memory import AREA, EXTENT, AddressSpaceGone, PageStatus, RunKind, wire
from samepage.memory.agent import DONATE_MAX, AgentAddressSpace
from samepage.memory.handshake import Terms


def merge_pages(space: AgentAddressSpace, vpns: np.ndarray) -> None:
    """Makes a segment of what the pages hold and maps it over them."""
    runs = np.array([(vpn, 1) for vpn in vpns], AREA)
    donation = space.donate(runs)
    if donation.segment is None:
        return
    done = vpns[donation.status == PageStatus.DONE]
    extents, first = [], 0
    for last in range(1, len(done) + 1):
        if last == len(done) or done[last] != done[last - 1] + 1:
            extents.append((done[first], last - first, first))
            first = last
    space.merge(donation.segment, np.array(extents, EXTENT))
    donation.segment.close()


def serve(sock: socket.socket) -> None:
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        space = AgentAddressSpace.welcome(sock, wire.recv(sock), pid, uid, Terms(reserve=0))
        while True:
            vpn = 0
            while True:
                found = space.scan(vpn, DONATE_MAX)
                hashed = [
                    np.arange(r["vpn"], r["vpn"] + r["npages"]) for r in found.runs if r["kind"] == RunKind.HASHED
                ]
                if hashed:
                    merge_pages(space, np.concatenate(hashed))
                vpn = found.next_vpn
                if not vpn:
                    break
            time.sleep(0.002)
    except (AddressSpaceGone, wire.WireError, OSError):
        sock.close()


def main() -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(sys.argv[1])
    listener.listen(64)
    print("listening", flush=True)
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=serve, args=(sock,), daemon=True).start()


if __name__ == "__main__":
    main()
