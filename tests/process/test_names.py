"""What a process calls itself and its files is not taken for what the kernel says of it."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from samepage.estimate.process import Process
from samepage.process.identity import memory_of
from samepage.process.mappings import mappings

FILES = ["a\x0b\x0bb", "a\rVmFlags: mg\rb", "a\x85VmFlags: sh\x85b", "a\u2028Anonymous: x\u2028b", "a\nVmFlags: mg\nb"]
MAPS = """
import mmap, sys
file = open(sys.argv[1], "r+b")
mapped = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE)
mapped[0] = 1
print("ready", flush=True)
sys.stdin.read()
"""

NAMES = [b"\rVmHWM: x", b"\rVmSwap:\t9 kB"]
NAMED = """
import ctypes, sys
ctypes.CDLL(None).prctl(15, sys.argv[1].encode())
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def maps(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[int]:
    file = tmp_path / request.param
    file.write_bytes(bytes(mmap.PAGESIZE))
    yield from started(MAPS, str(file))


@pytest.fixture
def named(request: pytest.FixtureRequest) -> Iterator[int]:
    yield from started(NAMED, request.param.decode())


def started(code: str, argument: str) -> Iterator[int]:
    with subprocess.Popen(
        [sys.executable, "-c", code, argument], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.parametrize("maps", FILES, ids=ascii, indirect=True)
def test_a_file_that_is_mapped_may_have_any_name(maps: int) -> None:
    spans = [line.split()[:2] for line in Path(f"/proc/{maps}/maps").read_bytes().split(b"\n") if line]
    private = {int(span.split(b"-")[0], 16) for span, how in spans if how.endswith(b"p")}
    found = mappings(maps)
    assert {mapping.start for mapping in found} <= private
    assert len({mapping.start for mapping in found}) == len(found)
    assert not any(mapping.mergeable for mapping in found)


@pytest.mark.parametrize("maps", FILES, ids=ascii, indirect=True)
def test_the_same_for_a_scan(maps: int) -> None:
    opened = Process(maps).open()
    starts = [mapping.start for mapping in opened.mappings]
    assert len(set(starts)) == len(starts)
    assert opened.map_count == Path(f"/proc/{maps}/maps").read_bytes().count(b"\n")
    for fd in (opened.fd, *opened.more):
        os.close(fd)


@pytest.mark.parametrize("named", NAMES, ids=ascii, indirect=True)
def test_a_process_may_have_any_name(named: int) -> None:
    assert memory_of(named) == pytest.approx(memory_of(named), rel=0.5)
    status = Path(f"/proc/{named}/status").read_bytes().split(b"\n")
    assert memory_of(named) == sum(int(s.split()[1]) for s in status if s.startswith((b"VmHWM:", b"VmSwap:")))
