"""Pages that a device writes to later are not merged meanwhile, whichever way pages are swapped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from samepage.memory import EXTENT, ZERO_PAGE, PageStatus
from samepage.memory.wire import Flags, Swap
from tests.agent.asked import Process
from tests.agent.preload import Preload, compile_c

HERE = Path(__file__).parent
PAGES = (64 << 20) // 4096
"""As in registered.c."""

WAYS = {
    "move": Flags(0),
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
    if process.space.swap != (Swap.WP if WAYS[way] else Swap.MOVE):
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
