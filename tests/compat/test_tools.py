"""Tools that look at the memory and the time of programs find under samepage what they find without."""

from __future__ import annotations

import pytest

from tests.compat.programs import FULL_RATE, Program, Runs
from tests.compat.test_programs import C_PROGRAM, NUMPY

TOOLS = [
    Program(
        "perf",
        needs=["perf", "gcc"],
        prepare=C_PROGRAM,
        # Where samples fall varies; that most fall into one function does not.
        command="""perf record -q -o data ./program 60 2>data.said; perf report -i data --stdio 2>/dev/null |
            awk '$NF == "work" && $1 + 0 > 50 { print "most of it in", $NF }'""",
        forget=r"^data|^\.debug",
        joins=1,
    ),
    Program(
        "heaptrack",
        needs=["heaptrack", "heaptrack_print", "gcc"],
        prepare=C_PROGRAM,
        command="""heaptrack -o trace ./program 30 >said 2>&1; heaptrack_print trace.* |
            sed -n 's/ ([0-9]*.s)//; /^calls to\\|^temporary mem\\|^peak heap\\|^total mem/p'""",
        forget=r"^trace|^said",
        joins=1,
    ),
    Program(
        "memray",
        imports=["memray"],
        prepare=NUMPY,
        # memray says on stderr that what it finds by the name of mmap is not libc's. Which thread is
        # ahead decides the peak.
        command="""$PYTHON -m memray run -q -o trace arrays.py 2>said; echo $?
            $PYTHON -m memray stats trace | grep -A1 '^.*Total'""",
        forget=r"^trace|^said|__pycache__",
        joins=1,
        merges=True,
    ),
]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_a_tool_finds_the_same(runs: Runs, tool: Program):
    outcomes, report = runs.merged_copies(tool, 2, FULL_RATE)
    assert outcomes == [runs.bare(tool)] * 2
    assert report.joined >= 2 * tool.joins, report
    if tool.merges:
        assert report.bytes_saved_peak > 0, report
