"""What a process leaves when it dumps core: merged memory is in it as any private memory is."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.agent.preload import Preload, compile_c

HERE = Path(__file__).parent
LENGTH = 8 << 20
WORDS = LENGTH // 8
PATTERN = Path("/proc/sys/kernel/core_pattern").read_text().strip()
pytestmark = pytest.mark.skipif(
    "/" in PATTERN or PATTERN.startswith("|"), reason="cores do not go to the folder of the process (core_pattern)"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_c(HERE / "core.c", tmp_path_factory.mktemp("core") / "core", "-g")


def dump(preload: Preload, program: Path, how: str, folder: Path) -> tuple[int, Path]:
    """Have the program abort; returns where its 8 MiB were, and the core."""
    environment = os.environ | {"LD_PRELOAD": str(preload.library), "SAMEPAGE_SOCKET": preload.merge_all}
    done = subprocess.run([str(program), how], env=environment, cwd=folder, capture_output=True, text=True, timeout=100)
    (core,) = folder.iterdir()
    return int(done.stdout), core


def read(core: Path, start: int, length: int) -> bytes:
    """What the core holds of a range of addresses, with zeros for what is not in it."""
    found = bytearray(length)
    with core.open("rb") as file:
        header = file.read(64)
        (headers,) = struct.unpack_from("<Q", header, 32)
        size, number = struct.unpack_from("<HH", header, 54)
        for i in range(number):
            file.seek(headers + i * size)
            kind, _, offset, address, _, held = struct.unpack("<IIQQQQ", file.read(40))
            first, last = max(address, start), min(address + held, start + length)
            if kind == 1 and first < last:
                file.seek(offset + first - address)
                found[first - start : last - start] = file.read(last - first)
    return bytes(found)


@pytest.mark.parametrize("how", ["merged", "written", "forked", "moved", "unmerged", "shown"])
def test_every_byte_of_merged_memory_is_in_the_core(preload: Preload, program: Path, how: str, tmp_path: Path) -> None:
    start, core = dump(preload, program, how, tmp_path)
    words = np.frombuffer(read(core, start, LENGTH), np.uint64)
    assert (words == np.arange(1, WORDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).all()


def test_memory_that_the_program_keeps_out_of_cores_stays_out(preload: Preload, program: Path, tmp_path: Path) -> None:
    start, core = dump(preload, program, "hidden", tmp_path)
    assert not any(read(core, start, LENGTH))


def test_a_debugger_reads_merged_memory_from_the_core(preload: Preload, program: Path, tmp_path: Path) -> None:
    if not any((Path(folder) / "gdb").exists() for folder in os.environ["PATH"].split(os.pathsep)):
        pytest.skip("needs gdb")
    start, core = dump(preload, program, "merged", tmp_path)
    command = ["gdb", "-batch", "-nx", "-ex", f"x/2gx {start + LENGTH - 16}", str(program), str(core)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [int(word, 16) for word in printed.splitlines()[-1].split()[1:]] == [
        (i + 1) * 0x9E3779B97F4A7C15 % (1 << 64) for i in (WORDS - 2, WORDS - 1)
    ]
