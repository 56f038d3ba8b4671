"""Files of memory: ELF core dumps, raw memory images, and the memory files of QEMU and Firecracker snapshots.

An ELF core dump is known by its header (elf(5)), and its PT_LOAD segments are its memory: of a process (written by the
kernel, see core(5), or by gdb's gcore) or of a machine (QEMU's dump-guest-memory). Anything else is taken for a raw
image, page after page, unless it cannot be one: its size is no multiple of the page size, it starts as files of other
kinds do, or it is text. Holes of a sparse file are pages that were never there, and are skipped."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from samepage.estimate.source import BATCH_PAGES, Batch, Kind, Mapping, Opened, PageFlag, ScanError, with_stretch
from samepage.memory import PAGE_SIZE

FOREIGN = {
    b"\x1f\x8b": "gzip data: decompress it first",
    b"\xfd7zXZ\0": "xz data: decompress it first",
    b"\x28\xb5\x2f\xfd": "zstd data: decompress it first",
    b"\x04\x22\x4d\x18": "lz4 data: decompress it first",
    b"BZh": "bzip2 data: decompress it first",
    b"PK\x03\x04": "a zip archive",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"%PDF": "a PDF document",
    b"SQLite format 3\0": "an SQLite database",
    b"QFI\xfb": "a qcow2 disk image",
    b"QEVM": "a QEMU migration stream: write the memory with pmemsave or dump-guest-memory",
    b"KDUMP   ": "a compressed kernel dump: write it with makedumpfile -E",
    b"DISKDUMP": "a compressed kernel dump: write it with makedumpfile -E",
    b"!<arch>\n": "an ar archive",
    b"#!": "a script",
}
"""How files begin that are no memory images, and what to say of them."""

PT_LOAD, PT_NOTE, ET_CORE, PN_XNUM = 1, 4, 4, 0xFFFF
NT_PRPSINFO, NT_FILE = 3, 0x46494C45


class _Segment(NamedTuple):
    """A PT_LOAD: where its bytes are in the file, and in memory. Bytes."""

    offset: int
    address: int
    size: int


@dataclass(slots=True)
class _Core:
    segments: list[_Segment]
    files: list[tuple[int, int, str]]  # NT_FILE: start, end, path
    machine: bool  # of a machine, not of a process
    remarks: list[str]


class Image:
    """A file as a source. `pid` and `uid` are None: images are merged with each other like memory of one user."""

    pid = None
    uid = None

    def __init__(self, path: str) -> None:
        self.name = path

    def alive(self) -> bool:
        return True

    def expected_pages(self) -> int:
        try:
            status = os.stat(self.name)
        except OSError:
            return 0
        return min(status.st_size, status.st_blocks * 512 + PAGE_SIZE) // PAGE_SIZE

    def open(self) -> Opened:
        try:
            fd = os.open(self.name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as e:
            raise ScanError(f"{self.name}: {e.strerror}") from e
        try:
            return self._open(fd)
        except BaseException:
            os.close(fd)
            raise

    def _open(self, fd: int) -> Opened:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ScanError(f"{self.name}: not a regular file")
        if not status.st_size:
            raise ScanError(f"{self.name}: the file is empty")
        head = os.pread(fd, 1 << 16, 0)
        if head.startswith(b"\x7fELF"):
            core = _read_core(self.name, fd, head, status.st_size)
        else:
            _check_raw(self.name, head, status.st_size)
            core = _Core([_Segment(0, 0, status.st_size)], [], True, [])
        mappings = with_stretch([_mapping(segment, core) for segment in core.segments])
        opened = Opened(fd, mappings, iter(()), remarks=core.remarks)
        opened.batches = _batches(fd, core.segments)
        return opened


def _check_raw(name: str, head: bytes, size: int) -> None:
    """ScanError for what cannot be a raw image."""
    no = f"{name}: not a memory image"
    for magic, what in FOREIGN.items():
        if head.startswith(magic):
            raise ScanError(f"{no}: it is {what}")
    if head[257:262] == b"ustar":
        raise ScanError(f"{no}: it is a tar archive")
    if size % PAGE_SIZE:
        raise ScanError(f"{no}: no ELF core dump, and its {size} bytes are no whole number of {PAGE_SIZE}-byte pages")
    if _is_text(head):
        raise ScanError(f"{no}: it is text")


def _is_text(head: bytes) -> bool:
    """UTF-8 without control characters."""
    if any(byte < 32 and byte not in b"\t\n\r\f\x1b" for byte in head):
        return False
    try:
        head[:-4].decode()  # a character may be cut at the end
    except UnicodeDecodeError:
        return False
    return True


def _mapping(segment: _Segment, core: _Core) -> Mapping:
    end = segment.address + segment.size
    if core.machine:
        return Mapping(segment.address, end, Kind.IMAGE, "memory")
    for start, stop, path in core.files:
        if start < end and segment.address < stop:
            return Mapping(segment.address, end, Kind.FILE, path)
    return Mapping(segment.address, end, Kind.ANONYMOUS, "")


def _batches(fd: int, segments: list[_Segment]) -> Iterator[Batch]:
    for segment in segments:
        shift = segment.offset - segment.address
        for start, end in _data(fd, segment.offset, segment.offset + segment.size):
            # Whole pages of memory, of which any part is data.
            first = (start - shift) // PAGE_SIZE
            last = -(-(end - shift) // PAGE_SIZE)
            last = min(last, (segment.address + segment.size) // PAGE_SIZE)
            for vpn in range(first, last, BATCH_PAGES):
                vpns = np.arange(vpn, min(vpn + BATCH_PAGES, last), dtype=np.int64)
                yield Batch(vpns, np.full(len(vpns), PageFlag.FRAME, np.uint8), shift)


def _data(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of [start, end) that are no holes, cut at whole pages from `start`."""
    at = start
    while at < end:
        try:
            low = os.lseek(fd, at, os.SEEK_DATA)
            high = os.lseek(fd, low, os.SEEK_HOLE)
        except OSError as e:
            if e.errno == errno.ENXIO:  # nothing but a hole to the end
                return
            raise
        if low >= end:
            return
        low = start + (max(low, at) - start) // PAGE_SIZE * PAGE_SIZE
        high = min(start + -(-(high - start) // PAGE_SIZE) * PAGE_SIZE, end)
        if high > low:
            yield low, high
        at = max(high, at + 1)


# -- ELF -------------------------------------------------------------------------------------------------------


def _read_core(name: str, fd: int, head: bytes, size: int) -> _Core:
    """ScanError for ELF files that are no core dumps, or have no memory left in them."""
    wide, little = head[4:5] == b"\x02", head[5:6] == b"\x01"
    order = "<" if little else ">"
    header = struct.Struct(order + ("HHIQQQIHHHHHH" if wide else "HHIIIIIHHHHHH"))
    if len(head) < 16 + header.size:
        raise ScanError(f"{name}: a truncated ELF file: it ends within its header")
    kind, _, _, _, phoff, shoff, _, _, phentsize, phnum, *_ = header.unpack_from(head, 16)
    if kind != ET_CORE:
        raise ScanError(f"{name}: not a memory image: it is an ELF program or library, and no core dump")
    if phnum == PN_XNUM:  # more than fit: the number is in sh_info of the first section header
        section = os.pread(fd, 64 if wide else 40, shoff)
        phnum = struct.unpack_from(order + "I", section.ljust(64, b"\0"), 44 if wide else 28)[0]
    entry = struct.Struct(order + ("IIQQQQQQ" if wide else "IIIIIIII"))
    table = os.pread(fd, phnum * phentsize, phoff) if phentsize >= entry.size else b""
    if len(table) < phnum * phentsize or not phnum:
        raise ScanError(f"{name}: a truncated core dump: it ends before its program headers do")
    core = _Core([], [], False, [])
    missing = 0
    for i in range(phnum):
        fields = entry.unpack_from(table, i * phentsize)
        if wide:
            kind, _, offset, address, physical, in_file, _, _ = fields
        else:
            kind, offset, address, physical, in_file, *_ = fields
        if kind == PT_NOTE:
            _read_notes(os.pread(fd, min(in_file, 64 << 20), offset), order, wide, core)
        elif kind == PT_LOAD and in_file:
            there = max(0, min(in_file, size - offset))
            missing += in_file - there
            if there >= PAGE_SIZE:
                # A machine's: QEMU says where it is by physical addresses alone.
                core.segments.append(_Segment(offset, address or physical, there // PAGE_SIZE * PAGE_SIZE))
    core.segments.sort(key=lambda segment: segment.address)
    core.segments = [s for s in core.segments if s.address % PAGE_SIZE == 0]
    if missing:
        core.remarks.append(f"{name}: truncated: {missing} bytes of its memory are missing")
    if not core.segments:
        what = "all of its memory is missing" if missing else "there is no memory in it"
        raise ScanError(f"{name}: {'a truncated' if missing else 'a'} core dump: {what}")
    return core


def _read_notes(notes: bytes, order: str, wide: bool, core: _Core) -> None:
    """What PT_NOTE says: that it is of a process (NT_PRPSINFO), and which files were mapped where (NT_FILE)."""
    at, process = 0, False
    while at + 12 <= len(notes):
        namesz, descsz, kind = struct.unpack_from(order + "III", notes, at)
        name = notes[at + 12 : at + 12 + namesz].rstrip(b"\0")
        begin = at + 12 + -(-namesz // 4) * 4
        desc = notes[begin : begin + descsz]
        at = begin + -(-descsz // 4) * 4
        if name != b"CORE":
            continue
        process |= kind == NT_PRPSINFO
        if kind == NT_FILE:
            core.files = _mapped_files(desc, order, wide)
    core.machine = not process


def _mapped_files(desc: bytes, order: str, wide: bool) -> list[tuple[int, int, str]]:
    """NT_FILE (fs/binfmt_elf.c, fill_files_note): count, page size, then start, end and offset of each, then names."""
    word = struct.Struct(order + ("Q" if wide else "I"))
    if len(desc) < 2 * word.size:
        return []
    count = word.unpack_from(desc)[0]
    begin = 2 * word.size
    names = desc[begin + 3 * count * word.size :].split(b"\0")
    if len(names) < count:
        return []
    at = (begin + 3 * i * word.size for i in range(count))
    return [
        (word.unpack_from(desc, i)[0], word.unpack_from(desc, i + word.size)[0], name.decode(errors="replace"))
        for i, name in zip(at, names[:count], strict=True)
    ]
