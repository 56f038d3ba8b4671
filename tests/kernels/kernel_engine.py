"""Memory that the kernel's KSM merged is unmerged in a cgroup that is too small: by samepage, and by the kernel."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from tests.kernels.patience import must

ROUNDS = int(os.environ.get("KERNELS_UNMERGES", "20"))
KERNEL_ROUNDS = int(os.environ.get("KERNELS_RUN_2", "2"))


def kernel_engine(way: str) -> str:
    """Each time ENOMEM, nobody is killed, no byte is wrong, and with the limit raised the next call finishes. What
    writing 2 to `run` does there is counted, and need not be anything. How the agent swaps pages has no part in it."""
    from benchmarks import kernel_ksm
    from benchmarks.oom import Sizes, show
    from benchmarks.oom_kernel import by_the_kernel, in_process, is_good, under_a_limit

    if not kernel_ksm.available():
        return "left alone: this kernel has no KSM"
    if not Path("/proc/self/ksm_merging_pages").exists():  # 5.19
        return "left alone: this kernel does not say what it has merged of a process"
    sizes = Sizes(worker=160, part=24, limit=120)
    ours = under_a_limit(ROUNDS, in_process, sizes)
    show(ours)
    must(is_good(ours), json.dumps(asdict(ours)))
    kernels, deadly = by_the_kernel(KERNEL_ROUNDS, sizes)
    show(kernels)
    return (
        f"ok: {ours.enomem} of {ours.rounds} ENOMEM, {ours.killed} killed, {ours.times_full} times full, "
        f"{ours.refused} refused, {ours.pages_unmerged} pages copied; run = 2 killed in {deadly} of {kernels.rounds}"
    )
