"""The table of docs/compatibility.md, written from what `python -m tests.kernels --json docs/kernels.json` found.

python -m tests.kernels.table
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TypedDict

DOCS = Path(__file__).parents[2] / "docs"
RESULTS, DOCUMENT = DOCS / "kernels.json", DOCS / "compatibility.md"
BEGIN, END = "<!-- written by tests/kernels/table.py -->\n", "<!-- end -->\n"

WAYS = {"move": "by itself", "wp": "`--swap wp`"}


class Row(TypedDict):
    """What became of each check, and of which tree of samepage. Of the last boot: `slow`, how many times as long as a
    machine of 2025 it takes, the `seconds` of all of it, and `on` which day."""

    checks: dict[str, str]
    trees: dict[str, str]
    slow: float
    seconds: int
    on: str


Results = dict[str, Row]
"""By release and way of swapping."""


def is_well(outcome: str) -> bool:
    """Whether a check went as it should, or nothing was to be checked."""
    return outcome.startswith(("ok", "left alone"))


def _order(name: str) -> tuple[list[int], str]:
    release, _, way = name.partition(" ")
    return [int(number) for number in re.findall(r"\d+", release.partition("-")[0].partition("+")[0])], way


def _cell(row: Row, check: str) -> str:
    outcome = row["checks"].get(check)
    if outcome is None:
        return "–" if row["checks"].get("main job", "").startswith("left alone") else "not run"
    return outcome.partition(":")[0] if is_well(outcome) else f"**{outcome[:60]}**"


def _trees(row: Row) -> str:
    """In the order of the checks."""
    return ", ".join(f"`{tree}`" for tree in dict.fromkeys(row["trees"].values()))


def table(results: Results) -> str:
    """In Markdown: a column for each kernel and way, oldest first."""
    names = sorted(results, key=_order)
    checks = list(dict.fromkeys(check for name in names for check in results[name]["checks"]))
    lines = [["check"], ["---"], *([f"`{check}`"] for check in checks)]
    for name in names:
        release, _, way = name.partition(" ")
        row = results[name]
        lines[0].append(f"{release}, {WAYS[way]}")
        lines[1].append("---")
        for line, check in zip(lines[2:], checks, strict=False):
            line.append(_cell(row, check))
    lines.append(["tree", *(_trees(results[name]) for name in names)])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def written(document: str, results: Results) -> str:
    """The document with that table."""
    before, _, rest = document.partition(BEGIN)
    return f"{before}{BEGIN}{table(results)}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text(), json.loads(RESULTS.read_text())))
