"""One embedding worker, as a serving process would be: loads the model, then answers a line at a time.

Usage: python embedding_worker.py MODEL_FOLDER

Prints `ready BYTES` (what the weights take in memory) once loaded; then, for every sentence on standard input, its
embedding as one line of hexadecimal float32 bytes. An ordinary program: it does not know whether its pages are merged.
"""

from __future__ import annotations

import sys
from pathlib import Path

from minilm import MiniLM


def main() -> None:
    model = MiniLM(Path(sys.argv[1]))
    print(f"ready {model.weight_bytes}", flush=True)
    for line in sys.stdin:
        print(model.embed(line.rstrip("\n")).tobytes().hex(), flush=True)


if __name__ == "__main__":
    main()
