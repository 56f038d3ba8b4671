"""Proof that a process has what it claims, before it is given a segment: with the segment it gets all pages in it, not
only its own.

A claim is a checksum, which others may know, too. So the process hashes pages under a key made up a moment ago
(BLAKE2b, a message authentication code), and the service does the same with the segment's. One page that is equal is
enough: a process that has one could claim that page alone, so nothing is gained by asking for more. The service asks
for a few at once, since any of them may just have been written. If none of these is equal it asks for more, until no
claim is left. So an honest process loses no page by this, and a liar learns nothing.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from samepage.memory import PAGE_SIZE, U8, U64, PageStatus
from samepage.memory.wire import BODY_MAX, DONE, KEY_SIZE, PROOF_SIZE

AT_FIRST = 4
"""How many pages it asks for at first."""

MORE = 8
"""If none was equal, it asks for so many times more."""

AT_MOST = (BODY_MAX - DONE.itemsize) // (1 + PROOF_SIZE)
"""Pages whose proofs fit into one packet."""

Ask = Callable[[bytes, U64], tuple[U8, list[bytes]]]
"""Asks a process to hash pages under a key: the status of each, and its proof."""


def refuted(fd: int, extents: npt.NDArray[np.void], ask: Ask) -> U8 | None:
    """None if the process has one of the pages of `extents` as it is in the segment `fd`; else what it says of each, or
    that it is different."""
    npages = extents["npages"].astype(np.int64)
    ends = np.cumsum(npages)
    status: U8 = np.full(int(ends[-1]), PageStatus.DIFFERENT, np.uint8)
    for some in _batches(len(status)):
        which = np.searchsorted(ends, some, "right")
        offsets = extents["offset"][which]
        nth = (some - (ends - npages)[which]).astype(np.uint64)
        key = os.urandom(KEY_SIZE)
        said, proofs = ask(key, extents["vpn"][which] + nth)
        for at, its, proof, offset in zip(some.tolist(), said.tolist(), proofs, (offsets + nth).tolist(), strict=True):
            if its != PageStatus.DONE:
                status[at] = its
            elif proof == expected(key, _page(fd, offset)):
                return None
    return status


def expected(key: bytes, page: bytes) -> bytes:
    """The proof of a page. Empty, which proves nothing, if it is not a whole page."""
    return hashlib.blake2b(page, key=key, digest_size=PROOF_SIZE).digest() if len(page) == PAGE_SIZE else b""


def _page(fd: int, offset: int) -> bytes:
    try:
        return os.pread(fd, PAGE_SIZE, offset * PAGE_SIZE)
    except OSError:  # memory that failed, say
        return b""


def _batches(npages: int) -> Iterator[npt.NDArray[np.int64]]:
    """The numbers of all pages in the end."""
    first = random.sample(range(npages), min(AT_FIRST, npages))
    yield np.array(first)
    left, size = np.setdiff1d(np.arange(npages), first), AT_FIRST
    while len(left):
        size = min(MORE * size, AT_MOST)
        yield left[:size]
        left = left[size:]
