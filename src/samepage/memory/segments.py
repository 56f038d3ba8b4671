"""Segments in the service: the descriptors of the sealed memfds that came with donations."""

from __future__ import annotations

import fcntl
import math
import os
import stat
import threading

from samepage.memory import PAGE_SIZE

SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
"""The seals that make content and size immutable, so that nobody has to trust the writer."""


class Open:
    """How many segments this process holds, and how many it may (`most`): each takes a descriptor."""

    def __init__(self) -> None:
        self.most = math.inf
        self.lost = 0
        """How many donations found no descriptor."""
        self._lock = threading.Lock()
        self.count = 0

    def full(self) -> bool:
        """Whether there must not be one more; notes that one was wanted."""
        full = self.count >= self.most
        self.lost += full
        return full

    def add(self, count: int) -> None:
        with self._lock:
            self.count += count


OPEN = Open()


class SegmentError(ValueError):
    """A descriptor that is not a sealed segment of the right size."""


class MemfdSegment:
    """A sealed memfd of exactly `npages` pages. Takes ownership of `fd`, also when it raises `SegmentError`.

    The seals are checked here for the sake of the processes it will be passed to: a page compared equal must
    stay equal. (The agents check them again; a service is not to be trusted either.)
    """

    def __init__(self, fd: int, npages: int) -> None:
        self._fd = fd
        self._npages = npages
        OPEN.add(1)
        try:
            self._ino = self._check()
        except SegmentError:
            self.close()
            raise

    def _check(self) -> int:
        try:
            seals = fcntl.fcntl(self._fd, fcntl.F_GET_SEALS)
            st = os.fstat(self._fd)
        except OSError as e:
            raise SegmentError(f"no memfd: {e.strerror}") from e
        if not stat.S_ISREG(st.st_mode):
            raise SegmentError("no regular file")
        if seals & SEALS != SEALS:
            raise SegmentError(f"not sealed (seals {seals:#x})")
        if st.st_size != self._npages * PAGE_SIZE:
            raise SegmentError(f"{st.st_size} bytes instead of {self._npages} pages")
        if st.st_blocks * 512 < st.st_size:  # a process that compares would pay for what is not there
            raise SegmentError(f"a memfd with holes: {st.st_blocks * 512} bytes of {st.st_size}")
        return st.st_ino

    @property
    def ino(self) -> int:
        return self._ino

    @property
    def npages(self) -> int:
        return self._npages

    def fileno(self) -> int:
        """The descriptor, which stays this object's. ValueError once closed."""
        if self._fd < 0:
            raise ValueError("the segment is closed")
        return self._fd

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
            OPEN.add(-1)

    def __repr__(self) -> str:
        return f"<MemfdSegment ino={self._ino} npages={self._npages}{' closed' if self._fd < 0 else ''}>"
