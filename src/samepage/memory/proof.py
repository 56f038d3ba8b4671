"""Proof that a process has what it claims, before it is given a segment: with the segment it gets all pages in it, not
only its own.

A claim is a checksum, which others may know, too. So the process hashes pages under a key made up a moment ago
(BLAKE2b, a message authentication code), and the service does the same with the segment's. One page that is equal is
enough: a process that has one could claim that page alone, so nothing is gained by asking for more. The service asks
for a few at once, since any of them may just have been written. If none of these is equal it asks for more, until no
claim is left. So an honest process loses no page by this, and a liar learns nothing.

A question takes the service half as much time as a merge. So a process that is about to be given several segments is
asked for a few pages of each at once (`ahead`), some of which are still to be copied. Only where none of these is equal
to the segment's page is it asked again.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from samepage.memory import PAGE_SIZE, U8, U64, PageStatus
from samepage.memory.wire import BODY_MAX, DONE, KEY_SIZE, PROOF_SIZE

AT_FIRST = 4
"""How many pages it asks for at first."""

AHEAD = 2
"""How many pages of each of several segments."""

MORE = 8
"""If none was equal, it asks for so many times more."""

AT_MOST = (BODY_MAX - DONE.itemsize) // (1 + PROOF_SIZE)
"""Pages whose proofs fit into one packet."""

Ask = Callable[[bytes, U64], tuple[U8, list[bytes]]]
"""Asks a process to hash pages under a key: the status of each, and its proof."""


@dataclass(frozen=True, slots=True)
class Proved:
    """What a process proved ahead: the proofs of pages, all under one key."""

    key: bytes = b""
    vpns: U64 = field(default_factory=lambda: np.empty(0, np.uint64))
    proofs: list[bytes] = field(default_factory=list)

    def of(self, fd: int, extents: npt.NDArray[np.void]) -> bool:
        """Whether one of the pages of `extents` (ascending) is as it is in the segment `fd`."""
        first = np.ascontiguousarray(extents["vpn"])
        which = np.maximum(np.searchsorted(first, self.vpns, "right") - 1, 0)
        nth = self.vpns - first[which]  # of what lies before them all, very many
        its = np.flatnonzero(nth < extents["npages"][which])
        offsets = (extents["offset"][which[its]] + nth[its]).tolist()
        return any(
            self.proofs[i] == expected(self.key, _page(fd, offset))
            for i, offset in zip(its.tolist(), offsets, strict=True)
        )


def ahead(claims: Sequence[npt.NDArray[np.int64]], ask: Ask) -> Proved:
    """What the process proves of a few pages of each claim."""
    chosen = [vpns[random.sample(range(len(vpns)), min(AHEAD, len(vpns)))] for vpns in claims]
    vpns: U64 = np.concatenate(chosen).astype(np.uint64)[:AT_MOST]
    key = os.urandom(KEY_SIZE)
    status, proofs = ask(key, vpns)
    done = np.flatnonzero(status == PageStatus.DONE)
    return Proved(key, vpns[done], [proofs[i] for i in done.tolist()])


def refuted(fd: int, extents: npt.NDArray[np.void], ask: Ask, proved: Proved) -> U8 | None:
    """None if the process has one of the pages of `extents` as it is in the segment `fd`, as it `proved` or proves now;
    else what it says of each, or that it is different."""
    if proved.of(fd, extents):
        return None
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
