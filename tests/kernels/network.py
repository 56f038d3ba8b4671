"""Direct I/O on a network file system: what a server answers late is not lost, though pages are merged meanwhile."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.kernels.nfs import SlowServer
from tests.kernels.patience import SLOW, must, until

MODULES = ["sunrpc", "grace", "lockd", "nfs_acl", "nfs_localio", "auth_rpcgss", "nfs", "nfsv3"]
"""Which needs which differs. They are not loaded before this check is made: the agent sees whether they are."""

FINIT_MODULE = 313

PAGES = 128
"""Of which the first half is read into."""

READER = f"""
import ctypes, mmap, os, sys, threading
n = {PAGES} << 12
mapped = mmap.mmap(-1, n + (2 << 20), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
start = -address % (2 << 20)
mapped.madvise(mmap.MADV_NOHUGEPAGE)
area = memoryview(mapped)[start : start + n]
area[:] = bytes(n)
mapped.madvise(12, start, n)  # MADV_MERGEABLE
file = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
got = []
def read():
    got.append(os.preadv(file, [area[: n // 2]], 0))
thread = threading.Thread(target=read)
print(address + start, flush=True)
for line in sys.stdin:
    if line == "read\\n":
        thread.start()
        print("begun", flush=True)
    else:
        thread.join()
        right = lambda p: bytes([1 + (p >> 12) if p < n // 2 else 0]) * 4096
        wrong = [p for p in range(0, n, 4096) if area[p : p + 4096] != right(p)]
        print(got[0], len(wrong), flush=True)
"""
"""Its pages begin where a huge page's range does. The agent swaps no more than one such range at a time, and leaves
some pages of it around one that is held: up to 63 by write-protection. So all of the other half are merged."""


def load() -> None:
    """The modules, which are in the initramfs. Those that need one that is not there yet are tried again."""
    libc = ctypes.CDLL(None, use_errno=True)
    for _ in range(4):
        for name in MODULES:
            path = Path(f"/proc/1/root/lib/{name}.ko")
            if path.exists():
                with path.open("rb") as file:
                    libc.syscall(FINIT_MODULE, file.fileno(), b"", 0)
    must("\tnfs\n" in Path("/proc/filesystems").read_text(), "there is no NFS in this kernel")


@contextmanager
def mounted(source: str, kind: str, flags: int, options: str, at: str) -> Iterator[None]:
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.mount(source.encode(), at.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())
    must(done == 0, f"mount of {source}: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        libc.umount2(at.encode(), 2)  # MNT_DETACH


def merge_meanwhile(way: str) -> tuple[int, int, int]:
    """While a program waits for what it reads into half of its pages, all are merged. How many of that half are
    merged, how many of the others, and how many pages are wrong afterwards."""
    import numpy as np

    from samepage import agent
    from samepage.memory import EXTENT, ZERO_PAGE, PageStatus
    from samepage.memory.wire import Flags
    from tests.agent.asked import Process
    from tests.agent.preload import Preload

    content = b"".join(bytes([1 + page]) * 4096 for page in range(PAGES // 2))
    server = SlowServer(content)
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder) / "mounted"
        at.mkdir()
        with mounted("127.0.0.1:/root", "nfs", 0, server.options(), str(at)):
            flags = Flags.SWAP_WP if way == "wp" else Flags(0)
            command = [sys.executable, "-c", READER, str(at / "file")]
            process = Process(Preload(agent.library_path(), ""), Path(folder), command=command, flags=flags)
            try:
                process.tell("read")
                until("the server is asked", server.asked.is_set)
                zeros = np.array([(process.address // 4096, PAGES, ZERO_PAGE)], EXTENT)
                done = process.space.merge(None, zeros).status == PageStatus.DONE
                server.answer.set()
                got, wrong = map(int, process.tell("check").split())
            finally:
                server.answer.set()
                process.end()
    server.close()
    must(got == len(content), f"{got} bytes were read")
    return int(np.count_nonzero(done[: PAGES // 2])), int(np.count_nonzero(done[PAGES // 2 :])), wrong


def network_file_system(way: str) -> str:
    """The kernel takes plain references for that, which no move notices. So the agent looks whether there is such a
    file system: where that is hidden from it, the bytes are lost."""
    load()
    held, others, wrong = merge_meanwhile(way)
    must(not wrong, f"{wrong} pages are wrong, of {held} that were merged while a server was to fill them")
    must(not held, f"{held} pages were merged that a server was to fill")
    must(others == PAGES // 2, f"only {others} others were merged")
    if way != "move":
        return "ok"
    with tempfile.NamedTemporaryFile("w") as file:
        file.write("nodev\tproc\n\text3\n")
        file.flush()
        with mounted(file.name, "", 4096, "", "/proc/filesystems"):  # MS_BIND
            held, _, wrong = merge_meanwhile(way)
    print(f"hidden: {held} were merged, {wrong} are wrong, {SLOW:.0f} times as slow", flush=True)
    must(wrong or not held, "what is merged while a server is to fill it is not lost, so this proves nothing")
    return "ok" if wrong else "ok: this kernel pins what NFS reads into"
