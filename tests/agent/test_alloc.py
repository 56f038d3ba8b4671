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
