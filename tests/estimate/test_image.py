"""Files of memory: core dumps of gdb's and made by hand, raw images, and files that are neither."""

from __future__ import annotations

import gzip
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from samepage.estimate.image import Image
from samepage.estimate.look import look
from samepage.estimate.process import Process
from samepage.estimate.source import Kind, Opened, ScanError
from samepage.memory import PAGE_SIZE
from tests.estimate.conftest import report_of
from tests.estimate.fake import page_bytes
from tests.estimate.subject import Subject, mapping_at


@dataclass
class Core:
    """An ELF core dump, as it is to be written: segments (address, content), and what its notes say."""

    segments: list[tuple[int, bytes]]
    files: list[tuple[int, int, str]] = field(default_factory=list)
    process: bool = True
    wide: bool = True
    order: str = "<"
    physical: bool = False
    extended: bool = False
    """The number of program headers is in a section header (PN_XNUM)."""

    def notes(self) -> bytes:
        word = "Q" if self.wide else "I"
        out = b""
        if self.process:
            out += self._note(b"CORE", 3, bytes(136))
        else:
            out += self._note(b"QEMU", 0, bytes(40))
        if self.files:
            desc = struct.pack(self.order + word * 2, len(self.files), PAGE_SIZE)
            desc += b"".join(struct.pack(self.order + word * 3, start, end, 0) for start, end, _ in self.files)
            desc += b"".join(path.encode() + b"\0" for _, _, path in self.files)
            out += self._note(b"CORE", 0x46494C45, desc)
        return out

    def _note(self, name: bytes, kind: int, desc: bytes) -> bytes:
        name += b"\0"
        head = struct.pack(self.order + "III", len(name), len(desc), kind)
        return head + name.ljust(-(-len(name) // 4) * 4, b"\0") + desc.ljust(-(-len(desc) // 4) * 4, b"\0")

    def _program_header(self, kind: int, offset: int, address: int, size: int) -> bytes:
        virtual, physical = (0, address) if self.physical else (address, 0)
        if self.wide:
            return struct.pack(self.order + "IIQQQQQQ", kind, 6, offset, virtual, physical, size, size, PAGE_SIZE)
        return struct.pack(self.order + "IIIIIIII", kind, offset, virtual, physical, size, size, 6, PAGE_SIZE)

    def bytes(self) -> bytes:
        notes, count = self.notes(), len(self.segments) + 1
        header, entry, section = (64, 56, 64) if self.wide else (52, 32, 40)
        at = header + count * entry + section
        table = self._program_header(4, at, 0, len(notes))
        offset = -(-(at + len(notes)) // PAGE_SIZE) * PAGE_SIZE
        body = b""
        for address, content in self.segments:
            table += self._program_header(1, offset + len(body), address, len(content))
            body += content
        ident = b"\x7fELF" + bytes([2 if self.wide else 1, 1 if self.order == "<" else 2, 1]) + bytes(9)
        shoff = header + count * entry
        form = "HHIQQQIHHHHHH" if self.wide else "HHIIIIIHHHHHH"
        number = 0xFFFF if self.extended else count
        head = ident + struct.pack(
            self.order + form, 4, 62, 1, 0, header, shoff, 0, header, entry, number, section, 1, 0
        )
        info = bytes(44 if self.wide else 28) + struct.pack(self.order + "I", count)
        return (head + table + info.ljust(section, b"\0") + notes).ljust(offset, b"\0") + body


def written(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def pages(*contents: int) -> bytes:
    return b"".join(map(page_bytes, contents))


def problem(path: str) -> str:
    with pytest.raises(ScanError) as error:
        Image(path).open()
    assert str(error.value).startswith(path)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{path}: ")


def test_a_core_dump_of_gdbs_has_the_memory_of_the_process(tmp_path: Path) -> None:
    if shutil.which("gcore") is None:
        pytest.skip("needs gcore (Debian: gdb)")
    with Subject() as one:
        here = one.region(300)
        one.do("m.madvise(mmap.MADV_DODUMP)")
        one.fill(0, [0] * 40 + list(range(1, 101)) + [5] * 60)
        live = mapping_at(report_of(Process(one.pid)), one.pid, here).pages
        done = subprocess.run(["gcore", "-o", tmp_path / "core", str(one.pid)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"gcore cannot attach here: {done.stderr.strip()}")
    report = report_of(Image(f"{tmp_path}/core.{one.pid}"))
    dumped = next(m for m in report.sources[0].mappings if m.start <= here < m.end).pages
    assert dumped.duplicate_inside >= 60
    assert live.duplicate_inside == 61
    kinds = {mapping.kind for mapping in report.sources[0].mappings}
    assert Kind.FILE in kinds
    assert any("libc" in mapping.name for mapping in report.sources[0].mappings)


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize(("wide", "order"), [(True, "<"), (True, ">"), (False, "<"), (False, ">")])
def test_core_dumps_of_every_class_and_byte_order_are_read(
    tmp_path: Path, wide: bool, order: str, extended: bool
) -> None:
    core = Core(
        [(0x10000, pages(1, 2, 3)), (0x40000, pages(3, 0))],
        files=[(0x40000, 0x42000, "/lib/libx.so")],
        wide=wide,
        order=order,
        extended=extended,
    )
    report = report_of(Image(written(tmp_path / "core", core.bytes())))
    first, second = report.sources[0].mappings
    assert (first.kind, first.start, first.end) == (Kind.ANONYMOUS, 0x10000, 0x13000)
    assert (second.kind, second.name) == (Kind.FILE, "/lib/libx.so")
    assert (first.pages.unique, first.pages.duplicate_inside) == (2, 1)
    assert (second.pages.zero, second.pages.duplicate_inside) == (1, 1)
    assert report.problems == []


def test_the_dump_of_a_machine_is_one_memory_by_physical_addresses(tmp_path: Path) -> None:
    core = Core([(0, pages(1, 2)), (0x100000, pages(2))], process=False, physical=True)
    report = report_of(Image(written(tmp_path / "guest", core.bytes())))
    assert [(m.kind, m.start) for m in report.sources[0].mappings] == [(Kind.IMAGE, 0), (Kind.IMAGE, 0x100000)]
    assert report.pages.duplicate_inside == 2


def test_a_truncated_core_dump_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    whole = Core([(0x10000, pages(1, 2, 3)), (0x40000, pages(1, 2, 3, 4))]).bytes()
    report = report_of(Image(written(tmp_path / "core", whole[: -PAGE_SIZE - 100])))
    assert report.pages.total == 5
    assert report.pages.duplicate_inside == 4
    assert report.problems == [f"{tmp_path}/core: truncated: {PAGE_SIZE + 100} bytes of its memory are missing"]


@pytest.mark.parametrize(
    ("length", "why"),
    [
        (20, "a truncated ELF file: it ends within its header"),
        (70, "a truncated core dump: it ends before its program headers do"),
        (1000, "a truncated core dump: all of its memory is missing"),
    ],
)
def test_a_core_dump_without_any_memory_left_is_refused(tmp_path: Path, length: int, why: str) -> None:
    whole = Core([(0x10000, pages(1, 2, 3))]).bytes()
    assert problem(written(tmp_path / "core", whole[:length])) == why


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "the file is empty"),
        (b"abc", "its 3 bytes are no whole number of 4096-byte pages"),
        (bytes(5000), "its 5000 bytes are no whole number of 4096-byte pages"),
        (gzip.compress(os.urandom(10_000)), "it is gzip data: decompress it first"),
        (b"\x89PNG" + bytes(4092), "it is a PNG picture"),
        (b"QEVM" + bytes(4092), "it is a QEMU migration stream"),
        (b"#!/bin/sh\n" + b"#" * 4086, "it is a script"),
        ("Grüße, und sonst nichts als Text.\n".encode() * 4096, "it is text"),
        (bytes(257) + b"ustar" + bytes(PAGE_SIZE - 262), "it is a tar archive"),
    ],
)
def test_a_file_that_is_no_image_is_told_from_one(tmp_path: Path, content: bytes, why: str) -> None:
    assert why in problem(written(tmp_path / "file", content))


def test_a_program_is_no_image() -> None:
    assert "it is an ELF program or library" in problem(os.path.realpath("/bin/sh"))


def test_what_is_no_file_is_told(tmp_path: Path) -> None:
    assert problem(str(tmp_path / "none")) == "No such file or directory"
    assert problem(str(tmp_path)) == "not a regular file"
    os.mkfifo(tmp_path / "fifo")
    assert problem(str(tmp_path / "fifo")) == "not a regular file"


def test_two_raw_images_are_compared_with_each_other(tmp_path: Path) -> None:
    one = written(tmp_path / "one", pages(0, 1, 2, 3, 3))
    two = written(tmp_path / "two", pages(1, 2, 9))
    report = report_of(Image(one), Image(two))
    assert [source.pid for source in report.sources] == [None, None]
    assert (report.pages.zero, report.pages.duplicate_inside, report.pages.duplicate_between) == (1, 2, 4)
    assert [(pair.a, pair.b, pair.bytes) for pair in report.pairs] == [(0, 1, 2 * PAGE_SIZE)]


def test_holes_of_a_sparse_image_were_never_there(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(4096 * PAGE_SIZE)
        for at in (3, 1000, 4095):
            file.seek(at * PAGE_SIZE)
            file.write(page_bytes(at))
    if path.stat().st_blocks * 512 >= 4096 * PAGE_SIZE:
        pytest.skip("needs a file system with sparse files")
    report = report_of(Image(str(path)))
    assert report.pages.unique == 3
    assert report.pages.total < 100  # a file system may keep blocks larger than a page


def test_a_file_that_shrinks_while_it_is_read_is_told_of(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(64 * PAGE_SIZE))
    opened = Image(str(path)).open()
    os.truncate(path, 10 * PAGE_SIZE)

    class Shrunk(Image):
        def open(self) -> Opened:
            return opened

    report = report_of(Shrunk(str(path)))
    assert report.pages.unreadable in (0, 54)
    assert report.pages.unique == 10


def test_an_image_is_read_once_by_all_cores(tmp_path: Path) -> None:
    path = written(tmp_path / "image", os.urandom(1000 * PAGE_SIZE))
    seen = look([Image(path)])
    assert seen.pages_read == 1000
    assert len(set(seen.checksum.tolist())) == 1000


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_what_qemu_writes_of_a_machine_is_read(tmp_path: Path) -> None:
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        pytest.skip("needs QEMU (Debian: qemu-system-x86)")
    memory, raw, elf = (tmp_path / name for name in ("backing", "raw", "elf"))
    command = [qemu, "-m", "16", "-display", "none", "-nodefaults", "-monitor", "stdio"]
    command += ["-machine", "accel=tcg,memory-backend=ram"]
    command += ["-object", f"memory-backend-file,id=ram,size=16M,mem-path={memory},share=on"]
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(command, cwd=tmp_path, stdin=pipe, stdout=null, text=True) as machine:
        assert machine.stdin is not None
        try:
            # Until the BIOS has written its data area.
            wait_for(lambda: memory.exists() and any(memory.read_bytes()[0x400:0x500]))
            print("stop", file=machine.stdin, flush=True)
            bios = 256 << 10
            for file, size, line in ((raw, 0, "pmemsave 0 0x1000000 raw"), (elf, bios, "dump-guest-memory elf")):
                print(line, file=machine.stdin, flush=True)
                whole = (16 << 20) + size
                wait_for(lambda file=file, whole=whole: file.exists() and file.stat().st_size >= whole)  # type: ignore[misc]
        finally:
            machine.kill()
    reports = {name: report_of(Image(str(tmp_path / name))) for name in ("raw", "elf", "backing")}
    assert reports["raw"].pages.total == (16 << 20) // PAGE_SIZE
    assert reports["elf"].pages.total >= reports["raw"].pages.total
    assert {m.kind for m in reports["elf"].sources[0].mappings} == {Kind.IMAGE}
    assert reports["raw"].pages.unique > 10
    assert reports["backing"].pages.unique == reports["raw"].pages.unique
    # All three have the same memory, of which the first two have every page.
    both = report_of(Image(str(tmp_path / "raw")), Image(str(tmp_path / "elf")))
    assert both.pages.duplicate_between >= 2 * reports["raw"].pages.unique
