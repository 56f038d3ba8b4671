"""Two statically linked processes and two with the agent, whose memory is checked when a line comes: `crew.py HOLDER`.

Prints the pids of all as a JSON list, and then for each line how many words of each are wrong.
"""

from __future__ import annotations

import json
import subprocess
import sys

MIB = 16

DYNAMIC = f"""
import sys
import numpy as np
n = {MIB} << 17
def word(): return np.arange(n, dtype=np.uint64) * np.uint64(0x9e3779b97f4a7c15)
memory = word()
print("ready", flush=True)
for line in sys.stdin:
    memory[::512] += np.uint64(1)
    memory[::512] -= np.uint64(1)
    print(np.count_nonzero(memory != word()), flush=True)
"""


def main() -> None:
    commands = [[sys.argv[1], str(MIB)]] * 2 + [[sys.executable, "-c", DYNAMIC]] * 2
    crew = [subprocess.Popen(c, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for c in commands]

    def answers() -> list[str]:
        return [member.stdout.readline().strip() for member in crew if member.stdout is not None]

    assert answers() == ["ready"] * 4
    print(json.dumps([member.pid for member in crew]), flush=True)
    for _ in sys.stdin:
        for member in crew:
            assert member.stdin is not None
            member.stdin.write("check\n")
            member.stdin.flush()
        print(json.dumps(answers()), flush=True)
    for member in crew:
        member.communicate()


if __name__ == "__main__":
    main()
