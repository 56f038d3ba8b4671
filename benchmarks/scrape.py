"""What it costs to be scraped: a daemon that serves metrics, under load, asked for them again and again.

    python -m benchmarks.scrape --seconds 600

Processes hold equal memory, write some of it all the time, and end and start anew; one after the other is unmerged, and
merged again as it writes. Each scrape is compared with itself (the places add up to the totals, and stalls to how many
there were) and with what `samepage status` says just before and after; in the end all unmerges must have been counted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from samepage import agent
from samepage.service.control import Client

UNMERGE_EVERY = 5
"""Scrapes between two."""

WORK = """
import random, sys, time
import numpy as np
mib, seconds = int(sys.argv[1]), float(sys.argv[2])
array = np.random.default_rng(1).integers(0, 256, mib << 20, np.uint8)
ends = time.monotonic() + seconds * random.uniform(0.5, 1.5)
while time.monotonic() < ends:
    at = random.randrange(mib) << 20
    array[at : at + (1 << 16)] += 1
    time.sleep(0.05)
"""


def scrape(path: str) -> dict[str, float]:
    """Samples by name and labels."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        body = b"".join(iter(lambda: sock.recv(1 << 16), b"")).partition(b"\r\n\r\n")[2].decode()
    lines = [line.rpartition(" ") for line in body.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def summed(found: dict[str, float], name: str) -> float:
    return sum(value for key, value in found.items() if key.partition("{")[0] == name)


def wrong(found: dict[str, float]) -> str:
    """What does not add up within one scrape; "" if all does."""
    profit = found["node_ksmd_general_profit_bytes"] + found["samepage_metadata_bytes"]
    saved = summed(found, "samepage_saved_bytes")
    if saved != profit:
        return f"places save {saved}, all together {profit}"
    all_buckets = sum(value for key, value in found.items() if "stall_seconds_bucket{" in key and 'le="+Inf"' in key)
    stalls = summed(found, "samepage_stall_seconds_count")
    return "" if all_buckets == stalls else f"{stalls} stalls, {all_buckets} in buckets"


class Unmerging:
    """Has `samepage unmerge` unmerge one process after the other, each in its time."""

    def __init__(self, client: Client, path: str) -> None:
        self._client, self._path = client, path
        self._running: subprocess.Popen[bytes] | None = None
        self._turn = 0
        self.done = 0

    def next(self) -> None:
        """The next one, when the last is done."""
        if self._running is not None:
            if self._running.poll() is None:
                return
            self.done += self._running.returncode == 0
        pids = sorted(row["pid"] for row in self._client.ask("status")["processes"])
        if not pids:
            return
        self._turn += 1
        command = ["unmerge", "--socket", self._path, "--pid", str(pids[self._turn % len(pids)])]
        quiet = subprocess.DEVNULL
        self._running = subprocess.Popen([sys.executable, "-m", "samepage", *command], stdout=quiet, stderr=quiet)

    def end(self) -> None:
        if self._running is not None:
            self.done += self._running.wait() == 0


@contextlib.contextmanager
def crowd(socket_path: str, number: int, mib: int, seconds: float) -> Iterator[None]:
    """Keeps so many processes going, each for about so long."""
    environment = os.environ | {"SAMEPAGE_SOCKET": socket_path, "LD_PRELOAD": str(agent.library_path())}
    command = f"[sys.executable, '-c', {WORK!r}, '{mib}', '{seconds}']"
    runner = f"import subprocess, sys\nwhile True: subprocess.run({command})"
    started = [
        subprocess.Popen([sys.executable, "-c", runner], env=environment, start_new_session=True) for _ in range(number)
    ]
    try:
        yield
    finally:
        for process in started:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, 9)
            process.wait()


def measure(client: Client, path: str, metrics: str, seconds: float, every: float) -> dict[str, Any]:
    scrapes, took, faults, apart, unmerging = 0, [], [], 0, Unmerging(client, path)
    began = time.monotonic()
    first = scrape(metrics)
    while time.monotonic() - began < seconds:
        before = client.ask("stats")["counters"]
        start = time.perf_counter()
        found = scrape(metrics)
        took.append(time.perf_counter() - start)
        after = client.ask("stats")["counters"]
        scrapes += 1
        if what := wrong(found):
            faults.append(what)
        if before["bytes_saved"] == after["bytes_saved"]:
            apart += summed(found, "samepage_saved_bytes") != before["bytes_saved"]
        if scrapes % UNMERGE_EVERY == 0:
            unmerging.next()
        time.sleep(every)
    unmerging.end()
    last, wall = scrape(metrics), time.monotonic() - began
    took.sort()

    def spent(name: str) -> float:
        return round((last[name] - first[name]) / wall * 100, 3)

    return {
        "seconds": round(wall),
        "scrapes": scrapes,
        "every_seconds": every,
        "percent_of_a_core_for_metrics": spent("samepage_metrics_cpu_seconds_total"),
        "percent_of_a_core_for_the_service": spent("samepage_service_cpu_seconds_total"),
        "median_ms": round(took[len(took) // 2] * 1e3, 2),
        "longest_ms": round(took[-1] * 1e3, 2),
        "samples": len(last),
        "saved_mib": round(summed(last, "samepage_saved_bytes") / (1 << 20)),
        "service_rss_mib": round(last["samepage_service_resident_bytes"] / (1 << 20)),
        "did_not_add_up": len(faults),
        "differed_from_status": apart,
        "unmerges": unmerging.done,
        "unmerges_counted": summed(last, "samepage_unmerges_total"),
        "stalls": summed(last, "samepage_stall_seconds_count"),
        "stalls_seconds": round(summed(last, "samepage_stall_seconds_sum"), 4),
        "agents_cpu_seconds": round(summed(last, "samepage_agent_cpu_seconds_total"), 2),
        "cpu_seconds": round(last["samepage_cpu_seconds_total"], 2),
        "load": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--every", type=float, default=5)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="samepage-") as folder:
        path, metrics = f"{folder}/socket", f"{folder}/metrics"
        command = [sys.executable, "-m", "samepage", "daemon", "--socket", path, "--metrics", metrics]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as daemon:
            try:
                assert daemon.stdout is not None
                daemon.stdout.readline()
                with crowd(path, args.processes, args.mib, 30), Client(path) as client:
                    found = measure(client, path, metrics, args.seconds, args.every)
            finally:
                daemon.terminate()
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
