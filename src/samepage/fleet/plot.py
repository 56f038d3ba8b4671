"""A figure of a simulation."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from samepage.fleet import FleetError
from samepage.fleet.replay import Outcome


def plot(outcomes: list[Outcome], file: Path) -> None:
    """Write a figure of the saving over time. Raises FleetError for an unknown kind of file."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for outcome in outcomes:
        times = [0.0, *(moment.seconds for moment in outcome.moments)]
        saved = [moment.bytes_saved / 2**20 for moment in outcome.moments]
        axes.stairs(saved, times, baseline=None, label=f"{outcome.setting} ({outcome.cpu_seconds:.1f} s CPU)")
    axes.set_xlabel("seconds")
    axes.set_ylabel("MiB saved")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    try:
        figure.savefig(file)
    except ValueError as e:
        raise FleetError(f"cannot make {file}: {e}") from e
    finally:
        pyplot.close(figure)
