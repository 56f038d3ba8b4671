"""What `samepage scan` predicts for virtual machines, and what the kernel then saves of them.

    python -m benchmarks.virtual_machines --kernel VMLINUZ [--machines 3] [--memory 256] [--kvm] [--json FILE]

They are attached to while they run. Each boots the same kernel with the same image, a busybox that answers a line with
a checksum. As root; the kernel's KSM is put back as it was. Needs QEMU, busybox (static) and cpio.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import kernel_ksm
from benchmarks.bench import meters

MIB = 1 << 20
PAGE_SIZE = 4096
INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t devtmpfs dev /dev
for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do cat /bin/busybox >> /data; done
echo ready
while read line; do echo "answer $(echo "$line" | cat - /data | sha256sum)"; done
"""
PACE = {"pages_to_scan": "20000", "sleep_millisecs": "1", "smart_scan": "0"}
STILL = 3
"""Passes without anything more saved, after which that is all."""


def image(folder: Path) -> Path:
    """An initramfs."""
    root = folder / "root"
    for name in ("bin", "proc", "dev"):
        (root / name).mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox is not None
    shutil.copy(busybox, root / "bin" / "busybox")
    (root / "init").write_text(INIT)
    (root / "init").chmod(0o755)
    files = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    archive = subprocess.run(
        ["cpio", "-o", "-H", "newc", "--quiet"], cwd=root, input=files.encode(), capture_output=True
    )
    (folder / "initrd.gz").write_bytes(gzip.compress(archive.stdout))
    return folder / "initrd.gz"


class Spoken:
    """A process that answers lines."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid

    def wait_for(self, word: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if word in line:  # the firmware ends no line
                return line[line.index(word) :].strip()
        raise EOFError("it ended")

    def ask(self, what: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return self.wait_for("answer")

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


class Machine(Spoken):
    """A guest, which is spoken to over its serial line."""

    def __init__(self, kernel: Path, initrd: Path, memory: int, kvm: bool) -> None:
        command = ["qemu-system-x86_64", "-m", str(memory), "-nographic", "-no-reboot", "-kernel", str(kernel)]
        command += ["-accel", "kvm"] if kvm else ["-accel", "tcg"]
        command += ["-initrd", str(initrd), "-append", "console=ttyS0 quiet panic=-1", "-net", "none"]
        super().__init__(command)


def samepage(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "samepage", *arguments], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def predicted(pids: list[int]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(samepage("scan", "--json", "-", *map(str, pids)))
    return found


def counted() -> int:
    return (kernel_ksm.read("pages_sharing") + kernel_ksm.read("ksm_zero_pages")) * PAGE_SIZE


def wait_still(limit: float) -> None:
    """Until passes find nothing more."""
    most, until, deadline = 0, kernel_ksm.read("full_scans") + STILL, time.monotonic() + limit
    while kernel_ksm.read("full_scans") < until and time.monotonic() < deadline:
        if (now := counted()) > most + most // 500:
            most, until = now, kernel_ksm.read("full_scans") + STILL
        time.sleep(0.2)


def measure(processes: Sequence[Spoken], limit: float) -> dict[str, Any]:
    """As soon as all of them are ready; then they end."""
    try:
        for process in processes:
            process.wait_for("ready")
        return _measure(processes, limit)
    finally:
        for process in processes:
            process.end()


def _measure(processes: Sequence[Spoken], limit: float) -> dict[str, Any]:
    pids = [process.pid for process in processes]
    before = [process.ask("one") for process in processes]
    time.sleep(2)
    record: dict[str, Any] = {"scan": predicted(pids), "pss": meters.pss(pids)}
    samepage("attach", *map(str, pids))
    wait_still(limit)
    # Not by the kernel's counters: they are for the machine, and no zeros are in them that a huge page had.
    record |= {"predicted": record["scan"]["by_page"]["saved_bytes"], "saved": record["pss"] - meters.pss(pids)}
    record |= {"saved_by_predicted": round(record["saved"] / record["predicted"], 4), "counters": kernel_ksm.counters()}
    record["merging_pages"] = [kernel_ksm.merging_pages(pid) for pid in pids]
    kernel_ksm.write("run", 0)
    record["scan_again"] = predicted(pids)
    record["same_answers"] = before == [process.ask("one") for process in processes]
    samepage("detach", *map(str, pids))
    record["pss_detached"] = meters.pss(pids)
    record["left"] = [Path(f"/proc/{pid}/ksm_stat").read_text() for pid in pids]
    record["same_answers_detached"] = before == [process.ask("one") for process in processes]
    return record


@contextlib.contextmanager
def borrowed() -> Iterator[None]:
    """The kernel's KSM, still; it is put back also after SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with kernel_ksm.borrowed(run=0, **(kernel_ksm.DEFAULTS | PACE)):
        yield


def report(record: dict[str, Any], file: Path | None) -> None:
    if file:
        file.write_text(json.dumps(record, indent=1))
    print(json.dumps({name: value for name, value in record.items() if not name.startswith("scan")}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", type=Path, required=True)
    parser.add_argument("--machines", type=int, default=3)
    parser.add_argument("--memory", type=int, default=256, help="MiB of each")
    parser.add_argument("--kvm", action="store_true")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds that merging may take")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, borrowed():
        initrd = image(Path(folder))
        machines = [Machine(args.kernel, initrd, args.memory, args.kvm) for _ in range(args.machines)]
        record = measure(machines, args.limit)
    report(record, args.json)


if __name__ == "__main__":
    main()
