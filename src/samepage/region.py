"""Regions: buffers of this process that were declared mergeable."""

from __future__ import annotations

import ctypes
import errno
import os
from types import TracebackType
from typing import Any

from samepage import agent
from samepage.service import in_use
from samepage.service.in_use import attach

__all__ = ["Region", "UnmergeError", "attach", "register", "stats"]

PAGE_SIZE = os.sysconf("SC_PAGESIZE")

UNMERGE_STEP = 4096
"""Pages unmerged in one call of the agent. Python's signal handlers run between two."""

_PyBUF_WRITABLE = 0x1
_PyBUF_ANY_CONTIGUOUS = 0x80 | 0x10 | 0x8  # with PyBUF_STRIDES


class UnmergeError(OSError):
    """An unmerge that stopped before its end, with errno ENOMEM (not enough memory for the private copies: nothing was
    faulted for which there is none) or EINTR. What was done stays done; the region is still registered; calling again
    goes on.

    `pages_unmerged` have private copies again, `pages_remaining` are still merged; `bytes_needed` is
    what copies of these take, `bytes_available` what there is for them. `unseen`: nothing is available because what
    limits this process cannot be read from inside of it.
    """

    def __init__(
        self,
        code: int,
        pages_unmerged: int,
        pages_remaining: int,
        bytes_needed: int,
        bytes_available: int,
        unseen: bool = False,
    ) -> None:
        text = f"{os.strerror(code)}: {pages_unmerged} pages unmerged, {pages_remaining} still merged"
        if code == errno.ENOMEM:
            text += f"; {agent.UNSEEN}" if unseen else f"; {bytes_needed} bytes needed, {bytes_available} available"
        super().__init__(code, text)
        self.pages_unmerged = pages_unmerged
        self.pages_remaining = pages_remaining
        self.bytes_needed = bytes_needed
        self.bytes_available = bytes_available
        self.unseen = unseen


class _PyBuffer(ctypes.Structure):
    """`Py_buffer`, part of the stable ABI since Python 3.11."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


class _Pin:
    """Holds the memory of an object in place, as its buffer protocol promises: until `release`, never earlier."""

    def __init__(self, exporter: Any) -> None:
        # Not a memoryview: that tells no address, and refuses arrays in Fortran order.
        self._view = _PyBuffer()
        get = ctypes.pythonapi.PyObject_GetBuffer
        get.argtypes = (ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int)
        get(exporter, ctypes.byref(self._view), _PyBUF_ANY_CONTIGUOUS | _PyBUF_WRITABLE)
        self.address: int = self._view.buf or 0
        self.nbytes: int = self._view.len

    def release(self) -> None:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(self._view))


class Region:
    """A buffer whose whole pages are mergeable, from `register`. A context manager that closes.

    The buffer's memory is pinned until `close`, also when nobody holds the Region any more: what is freed while it is
    registered would be given to somebody else and merged.
    """

    def __init__(self, pin: _Pin, address: int, nbytes: int) -> None:
        self._pin: _Pin | None = pin
        self._address = address
        self._nbytes = nbytes
        self._registered = False

    @property
    def address(self) -> int:
        """Of the first whole page inside the buffer."""
        return self._address

    @property
    def nbytes(self) -> int:
        """Bytes of whole pages."""
        return self._nbytes

    @property
    def registered(self) -> bool:
        """Whether the region is mergeable, and may have merged pages."""
        return self._registered

    def merge(self) -> int:
        """Merge now, without waiting for scans; returns how many pages of the region are merged then.

        The caller vows that no thread touches the buffer meanwhile where only unprivileged userfaultfd is to be had (a
        system call on it could fail with EFAULT). An unmerged region is registered again. Raises ValueError when
        closed; OSError: ENOTCONN, ENOTSUP, or what the service says.
        """
        self._register()
        agent.quiet(self._address, self._nbytes, True)
        try:
            outcome = in_use.merge(self._address // PAGE_SIZE, self._nbytes // PAGE_SIZE)
        finally:
            agent.quiet(self._address, self._nbytes, False)
        return int(outcome["pages_merged"])

    def unmerge(self) -> None:
        """Give every page a private copy again (MADV_UNMERGEABLE); the buffer stays pinned.

        Raises `UnmergeError`; then, and when a signal handler raises, the region is still registered and calling again
        goes on.
        """
        done = 0
        while self._registered:
            step = agent.unmerge(self._address, self._nbytes, UNMERGE_STEP)
            done += step.pages_unmerged
            if step.errno == 0:
                self._registered = False
            elif step.errno not in (errno.EAGAIN, errno.EINTR):
                raise UnmergeError(step.errno, done, *step[2:])

    def close(self) -> None:
        """Unmerge and let go of the buffer. Raises as `unmerge` does, and then keeps it."""
        self.unmerge()
        _regions.discard(self)
        pin, self._pin = self._pin, None
        if pin is not None:
            pin.release()

    def _register(self) -> None:
        if self._pin is None:
            raise ValueError("the region is closed")
        if self._registered:
            return
        self._registered = True  # first: a KeyboardInterrupt right after the call must not find it forgotten
        try:
            agent.register(self._address, self._nbytes)
        except OSError:
            self._registered = False
            raise

    def __enter__(self) -> Region:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._pin is None else "registered" if self._registered else "unmerged"
        return f"<samepage.Region {self._address:#x}, {self._nbytes} bytes, {state}>"


_regions: set[Region] = set()
"""Every region that is not closed: what keeps the pins."""


def register(array: Any) -> Region:
    """Declare the whole pages inside `array` mergeable (MADV_MERGEABLE), and keep it in place until `Region.close`.

    `array` is anything that exports a contiguous writable buffer: a numpy array, bytearray, mmap, memoryview,
    array.array. Raises TypeError when it exports none, BufferError (ValueError from numpy) when it is read-only or not
    contiguous, OSError with the agent's errno else: EINVAL (no whole page inside), ENOTSUP (no userfaultfd), ENOMEM.
    """
    pin = _Pin(array)
    try:
        start = -(-pin.address // PAGE_SIZE) * PAGE_SIZE
        nbytes = (pin.address + pin.nbytes) // PAGE_SIZE * PAGE_SIZE - start
        if nbytes <= 0:
            raise OSError(errno.EINVAL, f"no whole page inside the {pin.nbytes} bytes")
        in_use.service()
        region = Region(pin, start, nbytes)
        region._register()
    except Exception:
        pin.release()
        raise
    _regions.add(region)
    return region


def stats() -> dict[str, int]:
    """The counters of the service in use, by KSM's names and meanings (Documentation/admin-guide/mm/ksm.rst)."""
    return in_use.service().stats()
