"""Draws Grafana's board with the data of a real Prometheus, where there is no Grafana at hand.

    python -m benchmarks.board http://127.0.0.1:9090 --minutes 20 -o board.png

The queries, titles, units and places of the panels are those of examples/grafana/samepage.json; the drawing is
matplotlib's, and looks like nothing but itself.
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.dates
import matplotlib.figure
from matplotlib.ticker import FuncFormatter

BOARD = Path(__file__).parents[1] / "examples/grafana/samepage.json"
VARIABLES = {"$job": "samepage", "$instance": ".*", "$domain": ".*", "$__rate_interval": "1m"}
UNITS: dict[str, Callable[[float], str]] = {
    "bytes": lambda v: f"{v / (1 << 20):.0f} MiB",
    "percentunit": lambda v: f"{v * 100:.3g} %",
    "s": lambda v: f"{v * 1e6:.0f} µs" if abs(v) < 1e-3 else f"{v * 1e3:.3g} ms",
    "short": lambda v: f"{v:,.4g}",
}
CLOCK = matplotlib.dates.DateFormatter("%H:%M")  # type: ignore[no-untyped-call]

Series = tuple[str, list[float], list[float]]


def ask(prometheus: str, target: dict[str, Any], begin: float, end: float, step: float) -> list[Series]:
    """What a query of a panel comes to: name, times and values of each line."""
    expression = target["expr"]
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    arguments = urllib.parse.urlencode({"query": expression, "start": begin, "end": end, "step": step})
    with urllib.request.urlopen(f"{prometheus}/api/v1/query_range?{arguments}") as answer:
        found = json.load(answer)["data"]["result"]
    lines = []
    for one in found:
        name = target["legendFormat"]
        for label, value in one["metric"].items():
            name = name.replace("{{" + label + "}}", value if len(value) <= 40 else "…" + value[-24:])
        points = [(float(at), float(value)) for at, value in one["values"] if value != "NaN"]
        lines.append((name, [at for at, _ in points], [value for _, value in points]))
    return lines


def draw(axes: Any, panel: dict[str, Any], lines: list[Series]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    shown = UNITS[defaults["unit"]]
    axes.set_title(panel["title"], fontsize=9, loc="left")
    if panel["type"] == "stat":
        axes.axis("off")
        last = lines[0][2][-1] if lines and lines[0][2] else 0.0
        axes.text(0.5, 0.45, shown(last), fontsize=20, ha="center", va="center", transform=axes.transAxes)
        return
    lines = [(name, at, values) for name, at, values in lines if any(values)] or lines[:1]
    stacked = defaults["custom"].get("stacking", {}).get("mode") == "normal"
    base: dict[float, float] = {}
    for name, at, values in lines:
        times = [t / 86400 for t in at]
        bottom = [base.get(t, 0.0) if stacked else 0.0 for t in at]
        top = [b + v for b, v in zip(bottom, values, strict=True)]
        (line,) = axes.plot(times, top, linewidth=1, label=name)
        if stacked:
            axes.fill_between(times, bottom, top, alpha=0.3, color=line.get_color())
            base |= dict(zip(at, top, strict=True))
    axes.xaxis.set_major_formatter(CLOCK)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value)))
    axes.tick_params(labelsize=6)
    axes.grid(alpha=0.3)
    if lines:
        axes.legend(fontsize=6, loc="lower left", framealpha=0.7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prometheus", help="its address")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    panels = json.loads(BOARD.read_text())["panels"]
    end = time.time()
    begin = end - args.minutes * 60
    rows = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in panels)
    figure = matplotlib.figure.Figure(figsize=(14, rows * 0.36), dpi=80)
    grid = figure.add_gridspec(rows, 24, hspace=0, wspace=0, left=0.01, right=0.995, top=0.985, bottom=0.0)
    for panel in panels:
        at = panel["gridPos"]
        axes = figure.add_subplot(grid[at["y"] : at["y"] + at["h"], at["x"] : at["x"] + at["w"]])
        room = axes.get_position()
        axes.set_position((room.x0 + 0.04, room.y0 + 0.03, room.width - 0.05, room.height - 0.055))
        lines = [line for t in panel["targets"] for line in ask(args.prometheus, t, begin, end, args.minutes / 4)]
        draw(axes, panel, lines)
    figure.savefig(args.output)


if __name__ == "__main__":
    main()
