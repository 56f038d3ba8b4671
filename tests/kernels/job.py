"""What is done inside a virtual machine: the main job, and that it can be undone. Run by `python -m tests.kernels`.

    python job.py WAY

Prints one JSON object: a line for each check, "ok" or what was wrong instead.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MIB = 1 << 20
SIZE = 16 * MIB
BIN = Path(sys.executable).parent
SAMEPAGE = str(BIN / "samepage")

CHILD = f"""
import sys
data = bytearray(b"".join(i.to_bytes(8, "little") * 512 for i in range(1, {SIZE} // 4096 + 1)))
print("built", flush=True)
sys.stdin.readline()
assert all(data[p : p + 8] == (p // 4096 + 1).to_bytes(8, "little") for p in range(0, len(data), 4096))
print("right", flush=True)
"""


def start(socket: str, command: list[str]) -> subprocess.Popen[str]:
    library = subprocess.check_output(
        [sys.executable, "-c", "from samepage import agent; print(agent.library_path())"], text=True
    ).strip()
    env = os.environ | {"LD_PRELOAD": library, "SAMEPAGE_SOCKET": socket}
    return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def told(process: subprocess.Popen[str], what: str) -> bool:
    assert process.stdout is not None
    return process.stdout.readline() == f"{what}\n"


def pss(pid: int) -> int:
    found = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def ask(socket: str, *words: str) -> tuple[int, str]:
    done = subprocess.run([SAMEPAGE, words[0], "--socket", socket, *words[1:]], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def main_job(way: str, patience: float) -> dict[str, str]:
    """Two processes with the same memory: merged, unmerged each in its own way, and not a byte wrong."""
    said: dict[str, str] = {}
    folder = tempfile.mkdtemp()
    socket = f"{folder}/socket"
    daemon = subprocess.Popen(
        [SAMEPAGE, "daemon", "--socket", socket, "--swap", way], stderr=subprocess.PIPE, text=True
    )
    ends = time.monotonic() + patience
    while not os.path.exists(socket) and time.monotonic() < ends:
        time.sleep(0.1)
    children = [start(socket, [sys.executable, "-c", CHILD]) for _ in range(2)]
    try:
        assert all(told(child, "built") for child in children)
        before = sum(pss(child.pid) for child in children)
        saved = 0
        while saved < 0.8 * SIZE and time.monotonic() < ends:
            time.sleep(1)
            saved = before - sum(pss(child.pid) for child in children)
        if way == "move" and "UFFDIO_MOVE" in (first := ask(socket, "status")[1]):
            said["merges"] = "left alone: " + first.strip().splitlines()[-1]
            return said
        said["merges"] = "ok" if saved >= 0.8 * SIZE else f"{saved // MIB} of {SIZE // MIB} MiB saved"
        status, text = ask(socket, "unmerge", "--pid", str(children[0].pid), "--json")
        answer = json.loads(text.splitlines()[0])
        all_done = status == 0 and not answer["pages_remaining"] and answer["pages_unmerged"] >= 0.5 * SIZE / 4096
        said["unmerge --pid"] = "ok" if all_done else text
        status, text = ask(socket, "set", "run", "2")
        grown = sum(pss(child.pid) for child in children)
        said["run = 2"] = "ok" if status == 0 and grown >= before - SIZE // 8 else f"{status} {text} {before} {grown}"
        for child in children:
            print(file=child.stdin, flush=True)
        said["bytes"] = "ok" if all(told(child, "right") for child in children) else "wrong"
    finally:
        for child in children:
            child.kill()
            child.wait()
        daemon.terminate()
        daemon.wait()
    return said


HOG = """
import ctypes, mmap, sys
n = 24 << 20
area = mmap.mmap(-1, n, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.madvise(12)  # MADV_MERGEABLE
for i in range(0, n, 4096):
    area[i : i + 8] = (i % 4096 + 7).to_bytes(8, "little")
print("built", flush=True)
sys.stdin.readline()
print("right" if all(area[i] == 7 for i in range(0, n, 4096)) else "wrong", flush=True)
"""


def promise(way: str, patience: float) -> str:
    """In a real cgroup of version 2 whose limit is below what an unmerge takes: ENOMEM, and nobody is killed."""
    group = Path("/sys/fs/cgroup/samepage")
    if not Path("/sys/fs/cgroup/cgroup.controllers").exists():
        return "left alone: no cgroup version 2 here"
    group.mkdir()
    folder = tempfile.mkdtemp()
    socket = f"{folder}/socket"
    daemon = subprocess.Popen([SAMEPAGE, "daemon", "--socket", socket, "--swap", way, "--reserve", "1M"])
    ends = time.monotonic() + patience
    while not os.path.exists(socket) and time.monotonic() < ends:
        time.sleep(0.1)
    enter = f"echo $$ > {group}/cgroup.procs; exec {sys.executable} -c '{HOG}'"
    child = start(socket, ["/bin/sh", "-c", enter])
    try:
        assert told(child, "built")
        before = pss(child.pid)
        while pss(child.pid) > before - 20 * MIB and time.monotonic() < ends:
            time.sleep(1)
        used = int((group / "memory.current").read_text())
        (group / "memory.max").write_text(str(used + 8 * MIB))
        status, text = ask(socket, "unmerge", "--pid", str(child.pid), "--json")
        while ("ETIMEDOUT" in text or "has not joined" in text) and time.monotonic() < ends:  # a slow machine
            time.sleep(5)
            status, text = ask(socket, "unmerge", "--pid", str(child.pid), "--json")
        kills = re.search(r"^oom_kill (\d+)", (group / "memory.events").read_text(), re.MULTILINE)
        if status != 1 or '"ENOMEM"' not in text:
            return f"{status} {text} (used {used >> 20} MiB)"
        if child.poll() is not None or not kills or kills[1] != "0":
            return f"killed: {kills and kills[0]}"
        return "ok"
    finally:
        child.kill()
        child.wait()
        daemon.terminate()
        daemon.wait()


def main() -> None:
    way, patience = sys.argv[1], float(sys.argv[2])
    said = main_job(way, patience)
    if said.get("merges") == "ok":
        said["ENOMEM, not the killer"] = promise(way, patience)
    print("SAID " + json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
