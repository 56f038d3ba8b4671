"""The tree beside the kernel's own files: the same calls, the same answers."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks import kernel_ksm
from samepage.service.ksm_files import FILES
from tests.sysfs.conftest import KSM, Tree, attempt, needs_fuse, needs_root

pytestmark = [
    needs_fuse,
    needs_root,
    pytest.mark.skipif(not kernel_ksm.available(), reason="needs a kernel with KSM to compare with"),
]

Both = Callable[..., None]

NUMBERS = [
    *(b"", b"\n", b"1\n", b"7", b" 7", b"7 ", b"+7\n", b"-7\n", b"-0", b"0x10", b"007\n", b"7\n\n", b"7\0junk", b"\0"),
    *(b"7\n\0junk", b"4294967295\n", b"4294967296\n", b"18446744073709551616", b"99999999999999999999x", b"3 4"),
    *(b"1" * 5000, b"0" * 4095 + b"9", b"0" * 4094 + b"9\n9", b"2.5", b"++1", b"\xff\xfe"),
]
WORDS = [
    *(b"y\n", b"N", b"on\n", b"off", b"of", b"o", b"O", b"true", b"False\n", b"1abc", b"enable\n", b"d", b"\n", b"0\n"),
    *(b"none\n", b"scan-time", b"scan-time\n\n", b"scan-time ", b"[none] scan-time", b"2", b"-1", b"3"),
    *(
        b"18446744073709551616",
        b"18446744073709551616x",
        b"1\n\n",
        b"+1",
        b" 1",
        b"1\0\n",
        b"-2147483649",
        b"2147483648",
    ),
]


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """The kernel's files, nothing merged there, and ours, set alike."""
    tree = Tree(tmp_path_factory.mktemp("tree"))
    try:
        with kernel_ksm.borrowed(run=0, advisor_mode="none"):
            kernel_ksm.write("run", 2)
            kernel_ksm.write("run", 0)
            tree.write("advisor_mode", "none")
            for name in set(os.listdir(KSM)) - {"advisor_mode", "advisor_max_cpu"}:
                if (KSM / name).stat().st_mode & 0o200:
                    tree.write(name, (KSM / name).read_text())
            yield [KSM, tree.path]
    finally:
        tree.end()


@pytest.fixture
def both(trees: list[Path]) -> Both:
    """Does something to each, given its directory, and compares what came of it."""

    def both(what: Callable[..., object], *arguments: object) -> None:
        kernel, ours = (attempt(what, directory, *arguments) for directory in trees)
        assert ours == kernel, arguments

    return both


def write(directory: Path, name: str, data: bytes, flags: int = os.O_WRONLY | os.O_TRUNC, at: int | None = None) -> int:
    fd = os.open(directory / name, flags)
    try:
        return os.write(fd, data) if at is None else os.pwrite(fd, data, at)
    finally:
        os.close(fd)


def read(directory: Path, name: str) -> str:
    return (directory / name).read_text()


def test_names_modes_owners_and_sizes(both: Both) -> None:
    both(lambda directory: sorted(os.listdir(directory)))
    for name in [".", *os.listdir(KSM)]:
        for field in ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blksize", "st_blocks"):
            both(lambda directory, name, field: getattr(os.stat(directory / name), field), name, field)


def test_formats(both: Both) -> None:
    """Of knobs set alike; of counters, of which the kernel does not set all to zero, whatever the number."""
    for name in set(os.listdir(KSM)) - {"advisor_max_cpu"}:
        if (KSM / name).stat().st_mode & 0o200:
            both(read, name)
        else:
            both(lambda directory, name: re.sub("[0-9]+", "N", read(directory, name)), name)


@pytest.mark.parametrize("data", NUMBERS, ids=lambda data: ascii(data[:20]))
def test_ways_to_write_a_number(both: Both, data: bytes) -> None:
    for name in ("sleep_millisecs", "pages_to_scan", "stable_node_chains_prune_millisecs"):
        both(write, name, b"5")
        both(write, name, data)
        both(read, name)


@pytest.mark.parametrize("data", WORDS, ids=lambda data: ascii(data[:20]))
def test_ways_to_write_a_word_or_what_has_few_values(both: Both, data: bytes) -> None:
    for name in ("smart_scan", "use_zero_pages", "merge_across_nodes", "advisor_mode", "run"):
        before = b"none" if name == "advisor_mode" else b"0"
        both(write, name, before)
        both(write, name, data)
        both(read, name)
        both(write, name, before)


def test_a_number_too_large_for_an_int(both: Both) -> None:
    for data in (b"2", b"1", b"0", b"-1", b"-2147483648", b"-2147483649", b"2147483648", b"256\n"):
        both(write, "max_page_sharing", data)
        both(read, "max_page_sharing")


VALUES = [
    *(0, 1, 2, 3, 99, 100, 101, 255, 32767, 32768, 32769, 65535, 65536, 10**6),
    *(
        2**31 - 1,
        2**31,
        2**32 - 1,
        2**32,
        2**32 + 5,
        2**63 - 1,
        2**63,
        2**64 - 1,
        2**64,
        10**30,
        -1,
        -2,
        -(2**31),
        -(2**63),
    ),
]


@pytest.mark.parametrize("name", [name for name in FILES if FILES[name].parse and name != "advisor_mode"])
def test_every_value_that_the_kernel_takes_is_taken_and_reads_back_as_there(both: Both, name: str) -> None:
    for value in VALUES:
        before = b"2" if name == "max_page_sharing" else b"1" if name != "run" else b"0"
        both(write, name, before)
        both(write, name, b"%d\n" % value)
        both(read, name)
        both(write, name, before)


def test_a_minimum_over_its_maximum_is_taken(both: Both) -> None:
    for least, most in ((0, 0), (10, 5), (2**64 - 1, 0), (0, 2**64 - 1)):
        both(write, "advisor_min_pages_to_scan", b"%d" % least)
        both(write, "advisor_max_pages_to_scan", b"%d" % most)
        both(write, "advisor_mode", b"scan-time")
        both(write, "advisor_mode", b"none")
        for name in ("advisor_min_pages_to_scan", "advisor_max_pages_to_scan"):
            both(read, name)
    both(write, "advisor_min_pages_to_scan", b"500")
    both(write, "advisor_max_pages_to_scan", b"30000")


def test_pages_to_scan_is_the_advisors_in_mode_scan_time(both: Both) -> None:
    both(write, "advisor_mode", b"scan-time")
    both(read, "advisor_mode")
    both(read, "pages_to_scan")
    both(write, "pages_to_scan", b"100")
    both(write, "advisor_mode", b"none")
    both(write, "pages_to_scan", b"100")


def test_files_that_can_only_be_read(both: Both) -> None:
    for name in (name for name in os.listdir(KSM) if not (KSM / name).stat().st_mode & 0o200):
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND):
            both(write, name, b"1", flags)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 4096, 200_000])
def test_reading_in_parts_and_at_offsets(both: Both, size: int) -> None:
    def pread(directory: Path, at: int) -> bytes:
        with (directory / "sleep_millisecs").open("rb", buffering=0) as file:
            return os.pread(file.fileno(), size, at)

    def sequentially(directory: Path) -> list[bytes]:
        with (directory / "sleep_millisecs").open("rb", buffering=0) as file:
            return [os.read(file.fileno(), size) for _ in range(6)]

    both(write, "sleep_millisecs", b"1234")
    for at in (0, 1, 3, 4, 5, 6, 4095, 4096, 1 << 40):
        both(pread, at)
    both(sequentially)


def test_a_file_held_open_shows_a_new_value_when_read_from_its_beginning(both: Both) -> None:
    def hold(directory: Path) -> list[object]:
        with (directory / "sleep_millisecs").open("r+b", buffering=0) as file:
            fd = file.fileno()
            seen: list[object] = [os.read(fd, 100), os.read(fd, 100)]
            seen += [os.pwrite(fd, b"456789\n", 0), os.read(fd, 100), os.lseek(fd, 0, os.SEEK_SET), os.read(fd, 3)]
            seen += [write(directory, "sleep_millisecs", b"8"), os.read(fd, 100), os.read(fd, 100)]
            seen += [os.pread(fd, 100, 0), os.write(fd, b"77"), os.lseek(fd, 0, os.SEEK_CUR), os.pread(fd, 9, 1)]
            return [*seen, os.lseek(fd, 0, os.SEEK_END)]

    both(write, "sleep_millisecs", b"20")
    both(hold)


@pytest.mark.parametrize("at", [None, 0, 2, 5000])
@pytest.mark.parametrize("flags", [0, os.O_TRUNC, os.O_APPEND, os.O_CREAT, os.O_CREAT | os.O_EXCL, os.O_DIRECT])
def test_where_it_is_written_and_how_the_file_was_opened_is_all_the_same(
    both: Both, at: int | None, flags: int
) -> None:
    both(write, "sleep_millisecs", b"20")
    both(write, "sleep_millisecs", b"31\n", os.O_WRONLY | flags, at)
    both(read, "sleep_millisecs")


def test_one_value_in_several_pieces_is_several_values(both: Both) -> None:
    def pieces(directory: Path) -> list[object]:
        with (directory / "sleep_millisecs").open("wb", buffering=0) as file:
            return [attempt(os.write, file.fileno(), b"4"), attempt(os.writev, file.fileno(), [b"5", b"6\n"])]

    both(pieces)
    both(read, "sleep_millisecs")


def test_truncating_changes_nothing(both: Both) -> None:
    for size in (0, 9):
        both(lambda directory, size: os.truncate(directory / "sleep_millisecs", size), size)
        both(lambda directory: os.stat(directory / "sleep_millisecs").st_size)
    both(lambda directory: os.truncate(os.open(directory / "run", os.O_WRONLY | os.O_TRUNC), 0))
    both(lambda directory: os.stat(directory / "run").st_size)
    both(read, "sleep_millisecs")


def test_the_directory_stays_as_it_is(both: Both) -> None:
    both(lambda d: os.open(d / "new", os.O_CREAT | os.O_WRONLY))
    both(lambda d: os.open(d / "new", os.O_RDONLY))
    both(lambda d: os.open(d / "run", os.O_DIRECTORY))
    both(lambda d: os.mkdir(d / "new"))
    both(lambda d: os.mkfifo(d / "new"))
    both(lambda d: os.symlink("run", d / "new"))
    both(lambda d: os.link(d / "run", d / "new"))
    both(lambda d: os.rename(d / "run", d / "new"))
    both(lambda d: os.unlink(d / "run"))
    both(lambda d: os.rmdir(d / "run"))


def test_files_may_be_given_to_somebody_else(both: Both) -> None:
    def give(directory: Path) -> tuple[int, ...]:
        before = os.stat(directory / "run")
        os.chmod(directory / "run", 0o660)
        os.chown(directory / "run", 65534, 65533)
        after = os.stat(directory / "run")
        os.chown(directory / "run", before.st_uid, before.st_gid)
        os.chmod(directory / "run", before.st_mode & 0o7777)
        return after.st_mode, after.st_uid, after.st_gid

    both(give)
    both(lambda directory: os.utime(directory / "run"))


def test_other_calls(both: Both) -> None:
    def opened(call: Callable[[int], object], flags: int) -> Callable[[Path], object]:
        def what(directory: Path) -> object:
            fd = os.open(directory / "sleep_millisecs", flags)
            try:
                return call(fd)
            finally:
                os.close(fd)

        return what

    both(opened(lambda fd: os.read(fd, 9), os.O_WRONLY))
    both(opened(lambda fd: os.write(fd, b"1"), os.O_RDONLY))
    both(opened(lambda fd: fcntl.ioctl(fd, termios.TCGETS), os.O_RDONLY))
    both(opened(lambda fd: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB), os.O_RDONLY))
    both(opened(lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB), os.O_WRONLY))
    both(opened(lambda fd: os.posix_fallocate(fd, 0, 10), os.O_WRONLY))
    both(lambda directory: os.access(directory / "full_scans", os.W_OK))
    both(lambda directory: os.access(directory / "run", os.X_OK))


@pytest.mark.parametrize(
    "script",
    [
        "echo 9 > run",
        "echo -n 33 > sleep_millisecs; cat sleep_millisecs",
        "printf '%s\\n' 44 >> sleep_millisecs; cat sleep_millisecs",
        "echo 1 > full_scans",
        "echo 1 > rum",
        "grep . max_page_sharing merge_across_nodes run",
        "read x < sleep_millisecs; echo $x; tail -c 1 run | od -c; wc -c run; head -c 1 sleep_millisecs",
        "cp sleep_millisecs /dev/stdout; dd if=sleep_millisecs bs=1 2> /dev/null; dd if=run bs=1M status=none",
        "sed s/2/two/ sleep_millisecs; awk '{print $1 + 1}' run; echo 20 | tee sleep_millisecs",
        "ls; ls -A | wc -l; stat -c '%A %U %G %s %F' run full_scans; test -w run && echo yes",
    ],
)
def test_what_shell_scripts_do(both: Both, script: str) -> None:
    def run(directory: Path) -> tuple[int, str, str]:
        done = subprocess.run(["bash", "-c", script], cwd=directory, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    both(write, "sleep_millisecs", b"20")
    both(run)
