"""A running process, looked at from outside: /proc/PID/smaps, pagemap and mem, /proc/kpageflags and kpagecount.

What is looked at is what KSM would look at (vma_ksm_compatible and folio_test_anon in mm/ksm.c): anonymous pages that
are present, in mappings that are neither shared nor special. Only those are read: reading an absent page would create
it, or map a page of zeros."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from samepage.agent import MIN_ALLOC
from samepage.arrays import expand
from samepage.estimate import pages
from samepage.estimate.source import (
    BATCH_PAGES,
    Batch,
    Denied,
    Kind,
    Left,
    Mapping,
    NoMemory,
    Opened,
    PageFlag,
    ScanError,
    with_stretch,
)
from samepage.memory import PAGE_SIZE, U64
from samepage.memory.pagemap import PAGE_IS_HUGE, PAGE_IS_PFNZERO, PAGE_IS_SWAPPED, regions
from samepage.process.mappings import NOT_COMPATIBLE

WINDOW = {"uw", "dc", "dd"}
"""VmFlags of the agent's windows: registered, not for children, and in no core. They hold pages only while these are
swapped; whoever reads them a moment later makes the kernel put zeros there."""

# Documentation/admin-guide/mm/pagemap.rst
PM_PRESENT, PM_SWAP, PM_FILE, PM_MMAP_EXCLUSIVE = (np.uint64(1 << n) for n in (63, 62, 61, 56))
PM_PFN = np.uint64((1 << 55) - 1)
KPF_KSM, KPF_THP, KPF_ZERO_PAGE = (np.uint64(1 << n) for n in (21, 22, 24))

HEAP_ALIGN, HEAP_INFO = 64 << 20, struct.Struct("<4Q")
"""An arena of glibc's besides the brk heap lies in heaps at such addresses (HEAP_MAX_SIZE), each with a heap_info at
its start (malloc/arena.c): the arena, the heap before, bytes used, bytes that may be used."""

GUARD_MAX = 64 << 10
"""Bytes of the largest mapping without access that is taken for the guard below a thread's stack."""

_VMA = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (....) ([0-9a-f]+) \S+ \d+ *(.*)")


class PageFlags:
    """/proc/kpageflags and /proc/kpagecount, which are root's. `available` says whether this process may read them."""

    def __init__(self) -> None:
        self._files: list[int] = []
        with contextlib.suppress(OSError):
            for name in ("kpageflags", "kpagecount"):
                self._files.append(os.open(f"/proc/{name}", os.O_RDONLY | os.O_CLOEXEC))
        self.available = len(self._files) == 2 and _sees_frames()

    def flags(self, pfns: U64) -> U64:
        """KPF bits of each frame."""
        return pages.frame_entries(self._files[0], pfns)

    def mapcounts(self, pfns: U64) -> U64:
        """How often each frame is mapped."""
        return pages.frame_entries(self._files[1], pfns)

    def close(self) -> None:
        """Let go of them."""
        for fd in self._files:
            os.close(fd)


def _sees_frames() -> bool:
    """Whether pagemap has page frame numbers for this process: CAP_SYS_ADMIN, since Linux 4.0."""
    here = np.zeros(1, np.uint8)
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        (entry,) = struct.unpack("Q", os.pread(fd, 8, here.ctypes.data // PAGE_SIZE * 8))
    finally:
        os.close(fd)
    return bool(entry & int(PM_PFN))


class Process:
    """A process as a source. The page flags may be None, or not available: then the pagemap must do."""

    def __init__(self, pid: int, page_flags: PageFlags | None = None) -> None:
        self.pid = pid
        self._page_flags = page_flags if page_flags is not None and page_flags.available else None

    @cached_property
    def name(self) -> str:
        """Its comm; "?" when it has ended."""
        try:
            return Path(f"/proc/{self.pid}/comm").read_text(errors="replace").rstrip("\n")
        except OSError:
            return "?"

    @cached_property
    def uid(self) -> int:
        """Its effective user id; -1 when it has ended."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text(errors="replace")
        except OSError:
            return -1
        return int(status.partition("\nUid:")[2].split(None, 2)[1])

    def alive(self) -> bool:
        """Whether it has memory still."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text(errors="replace")
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] not in "ZX"

    def expected_pages(self) -> int:
        try:
            rollup = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        except OSError:
            return 0
        return int(rollup.partition("\nAnonymous:")[2].split(None, 1)[0]) * 1024 // PAGE_SIZE

    def open(self) -> Opened:
        directory = f"/proc/{self.pid}"
        fds: list[int] = []
        try:
            # Both are of the memory the process has now: after execve(2) or its end they read as empty.
            for name in ("mem", "pagemap"):
                fds.append(os.open(f"{directory}/{name}", os.O_RDONLY | os.O_CLOEXEC))
            smaps = Path(f"{directory}/smaps").read_bytes().decode(errors="replace")
        except OSError as e:
            for fd in fds:
                os.close(fd)
            raise self._error(e) from e
        mem, pagemap = fds
        mappings, map_count = _compatible(smaps, self._merge_any())
        mappings = [_without_arena(mapping, mem, pagemap) for mapping in mappings]
        opened = Opened(mem, mappings, iter(()), map_count, more=(pagemap,))
        if not opened.map_count:
            for fd in fds:
                os.close(fd)
            raise self._bare()
        opened.batches = self._batches(opened, pagemap)
        return opened

    def _merge_any(self) -> bool:
        """Whether all of its memory was made mergeable, by itself or by its parent: PR_SET_MEMORY_MERGE, Linux 6.4."""
        try:
            return "ksm_merge_any: yes" in Path(f"/proc/{self.pid}/ksm_stat").read_text()
        except OSError:
            return False

    def _bare(self) -> NoMemory:
        why = "it is a kernel thread" if self.alive() else "it has ended"
        return NoMemory(f"process {self.pid} ({self.name}) has no memory: {why}")

    def _error(self, e: OSError) -> ScanError:
        if e.errno in (errno.EACCES, errno.EPERM):
            why = "it is another user's, or privileged; run as root to look at it"
            if os.geteuid() == 0:
                why = "this system keeps even root from looking at it"
            return Denied(f"process {self.pid} ({self.name}): permission denied: {why}")
        if not os.path.exists(f"/proc/{self.pid}"):
            return NoMemory(f"process {self.pid}: no such process")
        if e.errno == errno.ESRCH:
            return self._bare()
        return ScanError(f"process {self.pid} ({self.name}): {e.strerror}")

    # -- the pages -----------------------------------------------------------------------------------------

    def _batches(self, opened: Opened, pagemap: int) -> Iterator[Batch]:
        """Pages of all mappings. Ends early when the process does."""
        pending: list[_Part] = []
        npages = 0
        for mapping in opened.mappings:
            for start, count, categories in _regions(pagemap, mapping.start, mapping.end, opened):
                for first in range(start, start + count, BATCH_PAGES):
                    size = min(BATCH_PAGES, start + count - first)
                    if npages + size > BATCH_PAGES:
                        yield self._batch(pending, opened)
                        pending, npages = [], 0
                    entries = _pread(pagemap, size * 8, first * 8)
                    if not entries:
                        opened.gone = True
                        break
                    pending.append(_Part(mapping, first, categories, entries))
                    npages += size
        if pending:
            yield self._batch(pending, opened)

    def _batch(self, parts: list[_Part], opened: Opened) -> Batch:
        """The pages of these parts that KSM would see, and what samepage merged."""
        count = np.array([len(part.entries) // 8 for part in parts])
        entries = np.frombuffer(b"".join(part.entries for part in parts), np.uint64)
        vpns = expand(np.array([part.first for part in parts]), count)
        flags = np.repeat(np.array([part.flags for part in parts], np.uint8), count)
        segment = np.repeat(np.array([part.mapping.kind is Kind.SEGMENT for part in parts]), count)
        uncounted = np.repeat(np.array([part.categories is None for part in parts]), count)
        opened.swapped += int(np.count_nonzero(uncounted & (entries & PM_SWAP != 0)))
        file = entries & PM_FILE != 0  # a page of the file itself: nobody wrote it yet
        there = (entries & PM_PRESENT != 0) & (~file | segment)
        flags[file] |= PageFlag.ELSEWHERE
        vpns, flags, entries = vpns[there], flags[there], entries[there]
        flags[entries & PM_MMAP_EXCLUSIVE == 0] |= PageFlag.SHARED
        if self._page_flags is None:
            shared = flags & (PageFlag.SHARED | PageFlag.ELSEWHERE)
            flags[shared == PageFlag.SHARED] |= PageFlag.OUTSIDE
            flags[shared == 0] |= PageFlag.FRAME
            return Batch(vpns, flags)
        pfns = entries & PM_PFN
        kpf = self._page_flags.flags(pfns)
        flags[kpf & KPF_ZERO_PAGE != 0] |= PageFlag.ELSEWHERE
        flags[kpf & KPF_KSM != 0] |= PageFlag.KSM
        flags &= ~PageFlag.HUGE
        flags[kpf & KPF_THP != 0] |= PageFlag.HUGE
        shared = flags & (PageFlag.SHARED | PageFlag.KSM | PageFlag.ELSEWHERE)
        flags[shared == 0] |= PageFlag.FRAME
        frames = pfns[(shared != 0) & (flags & PageFlag.ELSEWHERE == 0)]
        return Batch(vpns, flags, frames=frames, mapcounts=self._page_flags.mapcounts(frames))


@dataclass(slots=True)
class _Part:
    """Pages of a mapping from page number `first` on, and their pagemap entries. `categories` (PAGE_IS_...) hold for
    all of them; None: not known."""

    mapping: Mapping
    first: int
    categories: int | None
    entries: bytes

    @property
    def flags(self) -> int:
        """What of their flags is known from that."""
        flags = PageFlag.TAKEN if self.mapping.taken else np.uint8(0)
        if self.categories and self.categories & PAGE_IS_PFNZERO:
            flags |= PageFlag.ELSEWHERE
        if self.categories and self.categories & PAGE_IS_HUGE:
            flags |= PageFlag.HUGE
        return int(flags)


def _compatible(smaps: str, merge_any: bool) -> tuple[list[Mapping], int]:
    """The mappings with pages that KSM would look at, and those of samepage's segments; and how many there are in
    all."""
    agent = "/libsamepage.so" in smaps
    # Memory that the agent swaps is registered with its userfaultfd (VM_UFFD_WP).
    registers = agent and re.search(r"^VmFlags:.* uw\b", smaps, re.MULTILINE) is not None
    dynamic = re.search(r"/(ld-|ld\.so|libc[.-])", smaps) is not None
    heap = Left.LARGE_ONLY if re.search(r"/libc(\.so\.6|-2\.)", smaps) else Left.BLOCKS  # glibc's
    header: re.Match[str] | None = None
    before: re.Match[str] | None = None
    anonymous, count = False, 0
    found: list[Mapping] = []
    with_pages: set[int] = set()
    for line in smaps.split("\n"):  # names of files may have anything else
        if line.startswith("Anonymous:"):
            anonymous = line.split()[1] != "0"
        elif line.startswith("VmFlags:") and header:
            vmflags = line.split()[1:]
            if NOT_COMPATIBLE.isdisjoint(vmflags) and not (registers and WINDOW.issubset(vmflags)):
                guarded = before is not None and _is_guard(before, header)
                left = None if not merge_any and "mg" in vmflags else _left(header, agent, dynamic, guarded, heap)
                registered = registers and "uw" in vmflags
                if registers and left in (None, Left.LARGE_ONLY) and _kind(header[5]) is Kind.ANONYMOUS:
                    left = None if registered or "mg" in vmflags else Left.LARGE_ONLY
                found.append(_mapping(header, left))
                # All that is registered may have been merged with the page of zeros, which is not anonymous.
                if anonymous or registered or found[-1].kind is Kind.SEGMENT:
                    with_pages.add(found[-1].start)
        elif line[:1] in "0123456789abcdef" and (match := _VMA.match(line)):  # the others start with a capital
            before, header, count = header, match, count + 1
    return [mapping for mapping in with_stretch(found) if mapping.start in with_pages], count


def _mapping(header: re.Match[str], left: Left | None) -> Mapping:
    start, end, name = int(header[1], 16), int(header[2], 16), header[5]
    return Mapping(start, end, _kind(name), name, taken=left is None, left=left)


def _left(header: re.Match[str], agent: bool, dynamic: bool, guarded: bool, heap: Left) -> Left | None:
    """Why `samepage run` would not take a mapping that is not advised MADV_MERGEABLE; None: it would. `heap`: why not
    the brk heap."""
    kind = _kind(header[5])
    if kind is Kind.SEGMENT:
        return None
    if not dynamic:
        return Left.STATIC
    if kind is not Kind.ANONYMOUS:
        return {Kind.HEAP: heap, Kind.STACK: Left.STACK}.get(kind, Left.FILE)
    if guarded:
        return Left.STACK
    # Under samepage large allocations are mappings without a header of glibc's, so their size has to do.
    large = agent and int(header[2], 16) - int(header[1], 16) >= MIN_ALLOC
    return None if large else Left.LARGE_ONLY


def _is_guard(mapping: re.Match[str], of: re.Match[str]) -> bool:
    """Whether it lies below a thread's stack."""
    start, end = int(mapping[1], 16), int(mapping[2], 16)
    return mapping[3] == "---p" and not mapping[5] and mapping[2] == of[1] and end - start <= GUARD_MAX


def _without_arena(mapping: Mapping, mem: int, pagemap: int) -> Mapping:
    """The same, and left alone if it is an arena of libc's."""
    if mapping.left is not Left.LARGE_ONLY or mapping.start % HEAP_ALIGN:
        return mapping
    try:
        (entry,) = struct.unpack("Q", os.pread(pagemap, 8, mapping.start // PAGE_SIZE * 8))
        # What is not there must not be read.
        head = os.pread(mem, HEAP_INFO.size, mapping.start) if entry & int(PM_PRESENT) else b""
        _, _, used, usable = HEAP_INFO.unpack(head)
    except (OSError, struct.error):
        return mapping
    if not 0 < used <= usable <= HEAP_ALIGN or usable % PAGE_SIZE or usable > mapping.end - mapping.start:
        return mapping
    return replace(mapping, left=Left.BLOCKS)


def _kind(name: str) -> Kind:
    if name.startswith("/memfd:samepage"):
        return Kind.SEGMENT
    if not name or name.startswith("[anon"):
        return Kind.ANONYMOUS
    if name == "[heap]":
        return Kind.HEAP
    if name.startswith("[stack"):
        return Kind.STACK
    return Kind.FILE


def _regions(file: int, start: int, end: int, opened: Opened) -> Iterator[tuple[int, int, int | None]]:
    """Regions of [start, end) with pages in them, as (vpn, pages, categories), and counts what is swapped.

    Where the kernel has no PAGEMAP_SCAN (before 6.7), all of it, with None for categories.
    """
    try:
        for first, last, categories in regions(file, start, end):
            if categories & PAGE_IS_SWAPPED:
                opened.swapped += (last - first) // PAGE_SIZE
            else:
                yield first // PAGE_SIZE, (last - first) // PAGE_SIZE, categories
    except OSError as e:
        if e.errno in (errno.ENOTTY, errno.EINVAL):
            yield start // PAGE_SIZE, (end - start) // PAGE_SIZE, None
        else:
            opened.gone = True


def _pread(fd: int, size: int, offset: int) -> bytes:
    """What can be read, in whole entries; nothing when the process has ended."""
    try:
        data = os.pread(fd, size, offset)
    except OSError:
        return b""
    return data[: len(data) // 8 * 8]
