"""`samepage doctor`, and what it and the agents of this machine agree on."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from samepage.memory.wire import Flags
from tests.agent.asked import Process
from tests.agent.preload import Preload, build_agent


def test_it_says_what_agents_come_to(tmp_path: Path) -> None:
    preload = Preload(build_agent(tmp_path), "")
    for option, flags in (("move", Flags(0)), ("wp", Flags.SWAP_WP)):
        done = subprocess.run(["samepage", "doctor", "--json", "--swap", option], capture_output=True, text=True)
        answer = json.loads(done.stdout)
        folder = tmp_path / option
        folder.mkdir()
        process = Process(preload, folder, flags=flags)
        assert answer["swap"] == process.space.swap.name.lower()
        assert answer["merges"] == (answer["swap"] in ("move", "wp")) == (done.returncode == 0)
        process.end()


def test_in_plain_words() -> None:
    done = subprocess.run(["samepage", "doctor"], capture_output=True, text=True)
    for name in ("kernel", "userfaultfd", "swap", "memory cgroup", "vm.max_map_count"):
        assert name in done.stdout
    assert done.stderr == ""


def test_a_command_whose_pages_are_swapped_by_write_protection_is_merged(tmp_path: Path) -> None:
    report = tmp_path / "saved.json"
    program = "import time; a = [bytearray(bytes(range(256)) * (64 << 10)) for _ in range(2)]; time.sleep(3)"
    command = ["samepage", "run", "--swap", "wp", "--set", "sleep_millisecs=0", "--json", str(report)]
    done = subprocess.run([*command, "--", "python3", "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    if found["swap"] == ["wp"]:
        assert found["bytes_saved_peak"] > 10 << 20
    else:
        assert "nothing is merged" in done.stderr
