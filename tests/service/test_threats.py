"""What the threat model (docs/threat-model.md) says of the kernel."""

from __future__ import annotations

import ctypes
import mmap
import os

from samepage.memory import PAGE_SIZE
from samepage.memory.segments import MemfdSegment
from tests.service import fake_agent

SYS_MREMAP = 25
MREMAP_MAYMOVE = 1


def test_whoever_maps_one_page_of_a_segment_can_read_all_of_it() -> None:
    """So segments cannot keep processes of one domain apart: the domain is the boundary."""
    segment = MemfdSegment(fake_agent.sealed(b"own" * PAGE_SIZE + bytes(PAGE_SIZE)), 4)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    view = libc.mmap(None, PAGE_SIZE, mmap.PROT_READ, mmap.MAP_PRIVATE, segment.fileno(), 0)
    segment.close()
    size = ctypes.c_size_t
    longer = libc.syscall(SYS_MREMAP, size(view), size(PAGE_SIZE), size(4 * PAGE_SIZE), MREMAP_MAYMOVE)
    assert longer > 0, os.strerror(ctypes.get_errno())
    assert ctypes.string_at(longer + 2 * PAGE_SIZE, 6) in (b"ownown", b"wnowno", b"nownow")
    libc.munmap(ctypes.c_void_p(longer), size(4 * PAGE_SIZE))
