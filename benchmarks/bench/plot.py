"""The figure: how memory is saved over time, and how many times less than ksmd everything takes."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.bench.measures import MIB, Record
from benchmarks.bench.report import TITLES
from benchmarks.bench.rows import DEFAULTS, KERNEL, LARGE, SAMEPAGE, Row

COLOURS = {SAMEPAGE: "tab:blue", LARGE: "tab:green", KERNEL: "tab:orange", DEFAULTS: "tab:red"}


def plot(records: list[Record], rows: list[Row], file: Path) -> None:
    """Write `file`; its suffix says the format (.svg, .png)."""
    names = [name for name in TITLES if any(r["experiment"] == name for r in records)]
    ratios = [row for row in rows if row.ratio is not None]
    height = max(4.0, 0.32 * len(ratios) + 1.5)
    figure, axes = plt.subplots(1, 1 + len(names[:1]), figsize=(15, height), layout="constrained", squeeze=False)
    if names:
        _curves(axes[0][0], [r for r in records if r["experiment"] == names[0]], TITLES[names[0]])
    _ratios(axes[0][-1], ratios)
    figure.savefig(file)
    plt.close(figure)


def _curves(axes: Axes, records: list[Record], title: str) -> None:
    """Bytes saved over time, every repeat."""
    labelled = set()
    for record in records:
        if "curve" not in record:
            continue
        side, curve = record["side"], record["curve"]
        label = None if side in labelled else side
        labelled.add(side)
        seconds = [max(t, 0.01) for t in curve["seconds"]]
        axes.plot(seconds, [saved / MIB for saved in curve["saved"]], color=COLOURS[side], label=label, alpha=0.7)
    axes.set(xscale="log", xlabel="seconds since merging was allowed", ylabel="MiB saved", title=title)
    axes.grid(alpha=0.3)
    axes.legend()


def _ratios(axes: Axes, rows: list[Row]) -> None:
    """How many times less than ksmd at its fastest, with what is promised."""
    for at, row in enumerate(rows):
        assert row.ratio is not None
        colour = {None: "tab:grey", True: "tab:green", False: "tab:red"}[row.reached]
        axes.barh(at, row.ratio, left=0, color=colour)
        axes.annotate(f" {row.ratio:.3g}", (max(row.ratio, 1.0), at), va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"{row.group}: {row.name}" for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="ksmd at its fastest / samepage", title="green: promised and reached; red: missed")
