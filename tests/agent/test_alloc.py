"""The malloc family under the agent: any program must find it as good as libc's own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.agent.preload import Preload, compile_c

MIB = 1 << 20
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_c(HERE / "blocks.c", tmp_path_factory.mktemp("blocks") / "blocks", "-fno-builtin", "-lpthread")


@pytest.mark.parametrize("seed", [1, 2])
def test_blocks_keep_their_bytes_without_a_service_to_join(preload: Preload, blocks: Path, seed: int) -> None:
    preload.run([str(blocks), str(MIB), "800", str(seed)], socket="/nowhere")


@pytest.mark.parametrize("seed", [1, 2])
def test_blocks_keep_their_bytes_while_every_page_of_them_is_merged(preload: Preload, blocks: Path, seed: int) -> None:
    preload.run([str(blocks), str(64 << 10), "3000", str(seed)], merged=True, SAMEPAGE_MIN_ALLOC=str(64 << 10))


def test_without_a_socket_in_the_environment_all_is_left_to_the_real_allocator(preload: Preload, blocks: Path) -> None:
    preload.run([str(blocks), str(MIB), "400", "1"])


PLACES = """
import ctypes, sys
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
print(*[libc.malloc(ctypes.c_size_t(int(size))) % 4096 for size in sys.argv[1:]])
"""


def placed(preload: Preload, *sizes: int, least: str = "") -> list[int]:
    """Where in its page malloc put a block of each of `sizes`; `least` is $SAMEPAGE_MIN_ALLOC."""
    command = [sys.executable, "-c", PLACES, *map(str, sizes)]
    return [int(word) for word in preload.run(command, socket="/nowhere", SAMEPAGE_MIN_ALLOC=least).split()]


def test_the_bound_is_read_from_the_environment_and_is_64_kib_at_least(preload: Preload) -> None:
    sizes = (256 << 10, MIB - 1, MIB)
    assert [p == 0 for p in placed(preload, *sizes)] == [False, False, True]
    assert [p == 0 for p in placed(preload, *sizes, least=str(256 << 10))] == [True, True, True]
    assert [p == 0 for p in placed(preload, 65535, 65536, least="1")] == [False, True]


def test_numpy_computes_the_same_on_merged_arrays(preload: Preload) -> None:
    program = """
import numpy as np, time
a = np.arange(1 << 20, dtype=np.float64)
time.sleep(0.3)
for i in range(20):
    b = a * i + a[::-1]
    a[i::100] += 1
    time.sleep(0.01)
c = np.resize(b, 3 << 20)
print(a.sum(), b.sum(), c.sum(), np.linalg.norm(c[:1000]))
"""
    command = [sys.executable, "-c", program]
    assert preload.run(command, merged=True) == preload.run(command, bare=True)


CXX = """
#include <cstdio>
#include <memory>
#include <thread>
#include <vector>
int main() {
	std::vector<std::unique_ptr<long[]>> blocks;
	for (int i = 0; i < 40; i++) {
		blocks.emplace_back(new long[1 << 18]);
		for (long j = 0; j < 1 << 18; j++)
			blocks.back()[j] = i;
	}
	long sum = 0;
	std::thread([&] { for (auto &b : blocks) for (long j = 0; j < 1 << 18; j++) sum += b[j]; }).join();
	std::vector<int> grown;
	for (int i = 0; i < 3000000; i++)
		grown.push_back(i);
	try { std::vector<char> huge(1UL << 62); } catch (std::exception &e) { sum += grown[2999999]; }
	std::printf("%ld\\n", sum);
}
"""


def test_new_and_delete_of_cxx(preload: Preload, tmp_path: Path) -> None:
    source = tmp_path / "news.cc"
    source.write_text(CXX)
    program = compile_c(source, tmp_path / "news", "-lpthread", compiler="g++", standard="c++17")
    assert preload.run([str(program)], merged=True) == preload.run([str(program)], bare=True)


@pytest.fixture(scope="module")
def reuse(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(compile_c(HERE / "reuse.c", tmp_path_factory.mktemp("reuse") / "reuse", "-fno-builtin"))


def cost(preload: Preload, *command: str, bare: bool) -> dict[str, int]:
    """Page faults, and KiB resident at the end, of one of the programs in reuse.c."""
    printed = preload.run(list(command), bare=bare, socket="" if bare else "/nowhere")
    return {line.split()[0]: int(line.split()[1]) for line in printed.splitlines()}


@pytest.mark.parametrize("what", ["random 3", "random 10", "random 40", "same", "growing", "tuned"])
def test_blocks_that_are_freed_and_allocated_again_fault_no_more_than_with_libc(
    preload: Preload, reuse: str, what: str
) -> None:
    libc, ours = (cost(preload, reuse, what, bare=bare) for bare in (True, False))
    assert ours["faults"] < 1.2 * libc["faults"] + 1000


@pytest.mark.parametrize("what", ["same", "growing", "holes", "holes, and trim"])
def test_no_more_stays_resident_of_freed_blocks_than_with_libc(preload: Preload, reuse: str, what: str) -> None:
    libc, ours = (cost(preload, reuse, what, bare=bare) for bare in (True, False))
    assert ours["resident"] < libc["resident"] + 1024


def test_what_nobody_needs_for_long_is_given_back(preload: Preload, reuse: str) -> None:
    before, after = (cost(preload, reuse, what, bare=False)["resident"] for what in ("holes", "holes, and work"))
    assert before > 70_000
    assert after < 50_000


def test_what_is_kept_of_freed_blocks_is_there_for_small_ones_at_a_limit(preload: Preload, reuse: str) -> None:
    cost(preload, reuse, "limited", bare=True)
    cost(preload, reuse, "limited", bare=False)


def test_libcs_own_environment_variables_hold_for_large_blocks(preload: Preload, reuse: str) -> None:
    ours = cost(preload, "env", "MALLOC_MMAP_THRESHOLD_=65536", reuse, "growing", bare=False)
    assert ours["faults"] > 50_000


def test_a_block_of_reused_memory_is_zeroed_by_calloc(preload: Preload, reuse: str) -> None:
    cost(preload, reuse, "zeroed", bare=False)


def test_a_block_that_was_merged_is_anonymous_memory_when_it_is_given_out_again(preload: Preload, reuse: str) -> None:
    preload.run([reuse, "merged"], merged=True)
    preload.run([reuse, "zeroed"], merged=True)
