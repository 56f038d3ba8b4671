"""Pages that a device writes to later are not merged meanwhile, whichever way pages are swapped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from samepage.memory import AREA, EXTENT, ZERO_PAGE, PageStatus
from samepage.memory.wire import Flags, Swap
from tests.agent.asked import Process
from tests.agent.preload import Preload, compile_c

HERE = Path(__file__).parent
PAGES = (64 << 20) // 4096
"""As in registered.c."""

WAYS = {
    "move": Flags(0),
    "move, beside a network file system": Flags.UNPINNED,
    "write-protect": Flags.SWAP_WP,
    "like Linux 6.1": Flags.SWAP_WP | Flags.LIKE_6_1,
    "like Linux 5.10": Flags.SWAP_WP | Flags.LIKE_5_10,
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_c(HERE / "registered.c", tmp_path_factory.mktemp("registered") / "registered")


@pytest.mark.parametrize("way", WAYS)
def test_a_registered_buffer_of_zeros_is_not_merged_and_holds_what_is_read_into_it(
    preload: Preload, tmp_path: Path, program: Path, way: str
) -> None:
    process = Process(preload, tmp_path, command=[str(program), str(tmp_path / "file")], flags=WAYS[way])
    if process.space.swap != (Swap.WP if Flags.SWAP_WP in WAYS[way] else Swap.MOVE):
        pytest.skip(f"pages are not swapped this way here, but: {process.space.swap.name}")
    first = process.address // 4096
    status = process.space.merge(None, np.array([(first, 2 * PAGES, ZERO_PAGE)], EXTENT)).status
    assert process.tell("read") == "0\n", "what the device wrote went to pages that nobody sees"
    assert not (status[:PAGES] == PageStatus.DONE).any()
    assert np.count_nonzero(status[PAGES:] == PageStatus.DONE) > 0.95 * PAGES, "what nobody holds was not merged"
    process.end()


@pytest.mark.parametrize("flags", [Flags.NO_MOVE, Flags.LIKE_6_1, Flags.LIKE_5_10], ids=lambda f: f.name.lower())
def test_without_uffdio_move_nothing_is_merged_that_its_owner_did_not_declare_quiet(
    preload: Preload, tmp_path: Path, flags: Flags
) -> None:
    """Unless the user chose write-protection."""
    process = Process(preload, tmp_path, flags=flags)
    if process.space.swap == Swap.NONE:
        pytest.skip("this user's userfaultfd does not hold up system calls")
    assert process.space.swap == Swap.QUIET_WP
    status = process.space.merge(None, np.array([(process.address // 4096, 512, ZERO_PAGE)], EXTENT)).status
    assert (status == PageStatus.REFUSED).all()
    process.end()


PARTS = """
import ctypes, mmap, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
n = 2 << 20
area = libc.mmap(None, ctypes.c_size_t(2 * n), 3, 0x22, -1, ctypes.c_long(0))
start = area + -area % n
advise = lambda at, length, advice: libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t(length), advice)
advise(start, n, 14)  # MADV_HUGEPAGE
ctypes.memset(start, 7, n)
child = os.fork()
if child == 0:
    advise(start + 4096, n - 4096, 4)  # MADV_DONTNEED: the child keeps the first part
    signal.pause()
advise(start, 4096, 4)
advise(start, n, 12)  # MADV_MERGEABLE
print(start, flush=True)
for line in sys.stdin:
    if line == "forbid\\n":
        print(libc.prctl(41, 1, 0, 0, 0), flush=True)
    if line == "allow\\n":
        print(libc.prctl(41, 0, 0, 0, 0), flush=True)
    if line == "end\\n":
        os.kill(child, 9)
        print("ended", flush=True)
"""
"""A process with parts of a huge page, of which its child has another."""


def test_parts_of_huge_pages_are_not_swapped_by_write_protection(preload: Preload, tmp_path: Path) -> None:
    """Migration says of a part that is held that it is not, if the page's first part is not mapped (6.1), or others map
    some part (6.18)."""
    process = Process(preload, tmp_path, PARTS, flags=Flags.SWAP_WP, huge=True)
    if process.space.swap == Swap.NONE:
        pytest.skip("this user's userfaultfd does not hold up system calls")
    assert process.space.swap == Swap.QUIET_WP, "it can have huge pages"
    process.tell("end")
    process.end()


@pytest.mark.parametrize("late", ["forbid", "allow"])
def test_nor_is_anything_once_there_can_be_huge_pages(preload: Preload, tmp_path: Path, late: str) -> None:
    process = Process(preload, tmp_path, PARTS, flags=Flags.SWAP_WP, huge=late == "forbid")
    if process.space.swap == Swap.NONE:
        pytest.skip("this user's userfaultfd does not hold up system calls")
    page = np.array([(process.address // 4096 + 8, 8)], AREA)
    assert process.tell(late) == "0\n"
    donated = process.space.donate(page)
    assert (donated.status == PageStatus.REFUSED).all() or donated.segment is not None
    if donated.segment is not None:
        extents = np.array([(process.address // 4096 + 16, 8, 0)], EXTENT)
        assert (process.space.merge(donated.segment, extents).status == PageStatus.REFUSED).all()
        donated.segment.close()
    process.tell("end")
    process.end()


PIPE = """
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
n = 64 << 12
area = mmap.mmap(-1, n, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(0, n, 4096):
    area[page : page + 4096] = bytes([page >> 12, 7]) * 2048
address = ctypes.addressof(ctypes.c_char.from_buffer(area))
reading, writing = os.pipe()
class Piece(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("length", ctypes.c_size_t)]
assert libc.vmsplice(writing, ctypes.byref(Piece(address, 8 << 12)), ctypes.c_size_t(1), 0) == 8 << 12
area.madvise(12)  # MADV_MERGEABLE
print(address, flush=True)
for line in sys.stdin:
    area[0 : 8 << 12] = bytes(8 << 12)
    got = os.read(reading, 8 << 12)
    print(sum(got[p << 12 : (p + 1) << 12] != bytes([p, 7]) * 2048 for p in range(8)), flush=True)
"""
"""A process of whose 64 pages the first 8 are in a pipe."""


@pytest.mark.parametrize("way", WAYS)
def test_pages_that_are_in_a_pipe_come_out_of_it_as_they_went_in(preload: Preload, tmp_path: Path, way: str) -> None:
    process = Process(preload, tmp_path, PIPE, flags=WAYS[way])
    if process.space.swap != (Swap.WP if Flags.SWAP_WP in WAYS[way] else Swap.MOVE):
        pytest.skip(f"pages are not swapped this way here, but: {process.space.swap.name}")
    first = process.address // 4096
    donated = process.space.donate(np.array([(first, 64)], AREA))
    assert donated.segment is not None
    status = process.space.merge(donated.segment, np.array([(first, 64, 0)], EXTENT)).status
    donated.segment.close()
    if not WAYS[way]:
        assert (status == PageStatus.DONE).all()
        assert process.tell("read") == "0\n"
    else:
        assert (status[:8] == PageStatus.BUSY).all()
    if WAYS[way] == Flags.UNPINNED:  # eight pages are left together, counted from where a huge page's range begins
        boundary = -first % 512
        assert (status[boundary + 8 if boundary < 8 else 8 :] == PageStatus.DONE).all()
    process.end()


def test_a_huge_page_of_which_a_pipe_has_a_part_stays_beside_a_network_file_system(
    preload: Preload, tmp_path: Path
) -> None:
    huge = PIPE.replace("n = 64 << 12", "n = 4 << 20").replace(
        "for page in range(0, n, 4096):",
        "start = -ctypes.addressof(ctypes.c_char.from_buffer(area)) % (2 << 20)\n"
        "area.madvise(mmap.MADV_HUGEPAGE)\n"
        "for page in range(0, n, 4096):",
    )
    huge = huge.replace("bytes([page >> 12, 7])", "bytes([(page - start) >> 12 & 255, 7])")
    huge = huge.replace("from_buffer(area))\nreading", "from_buffer(area)) + start\nreading")
    huge = huge.replace("area[0 : 8 << 12]", "area[start : start + (8 << 12)]")
    process = Process(preload, tmp_path, huge, flags=Flags.UNPINNED)
    if process.space.swap != Swap.MOVE:
        pytest.skip(f"pages are not swapped by move here, but: {process.space.swap.name}")
    if not process.huge():
        pytest.skip("there are no huge pages here")
    first = process.address // 4096
    donated = process.space.donate(np.array([(first, 512)], AREA))
    assert donated.segment is not None
    status = process.space.merge(donated.segment, np.array([(first, 512, 0)], EXTENT)).status
    donated.segment.close()
    assert (status[:8] == PageStatus.BUSY).all()
    process.end()
