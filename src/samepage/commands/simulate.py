"""`samepage simulate`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samepage.commands import CommandError
from samepage.commands.extra import fleet_errors

if TYPE_CHECKING:
    from samepage.fleet.replay import Outcome


class Simulate:
    """Say what other settings would have saved over a recorded time.

    Lets the time of a recording of one host pass again for ksmd, as it is by default and as it is set, and for the
    kernel's ksmd.
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("directories", metavar="DIR", type=Path, nargs="+", help="recordings of `samepage record`")
        parser.add_argument(
            "--set",
            metavar="KNOB=VALUE[,VALUE...]",
            action="append",
            default=[],
            help="a knob; of several values, and several knobs, every combination is simulated",
        )
        parser.add_argument("--host", metavar="NAME", help="of this host's recording, where there are several")
        parser.add_argument("--engine", choices=("samepage", "kernel"), help="only that one")
        parser.add_argument("--json", metavar="FILE", help="all of it, as JSON; -: to stdout, without the table")
        parser.add_argument("--plot", metavar="FILE", type=Path, help="what was saved over the time (SVG, PNG or PDF)")

    def run(self, args: argparse.Namespace) -> int:
        with fleet_errors():
            outcomes = _simulate(args)
            if args.plot:
                from samepage.fleet.plot import plot

                plot(outcomes, args.plot)
        if args.json:
            _write_json(args.json, outcomes)
        if args.json != "-":
            _print(outcomes)
        return 0


def _simulate(args: argparse.Namespace) -> list[Outcome]:
    from samepage.fleet import schema
    from samepage.fleet.replay import Engine, Replay, settings

    looks = schema.looks(args.directories)
    engines = [Engine(args.engine)] if args.engine else list(Engine)
    hosts = sorted({look.head.host for look in looks})
    if len(hosts) > 1 and args.host not in hosts:
        raise CommandError(f"recordings of {len(hosts)} hosts: choose one with --host ({', '.join(hosts[:5])}, ...)")
    looks = [look for look in looks if args.host in (None, look.head.host)]
    if not looks:
        raise CommandError(f"there is no recording of {args.host}")
    return [Replay(setting, looks[0].head.fraction).run(looks) for setting in settings(engines, args.set)]


def as_json(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """What programs are told."""
    return [
        {
            "engine": str(outcome.setting.engine),
            "knobs": outcome.setting.knobs,
            "bytes_saved_mean": outcome.mean_saved,
            "cpu_seconds": round(outcome.cpu_seconds, 3),
            "passes": outcome.passes,
            "pages_broken": outcome.pages_broken,
            "metadata_bytes": outcome.metadata_bytes,
            "moments": [
                {"seconds": round(m.seconds, 3), "bytes_saved": m.bytes_saved, "cpu_seconds": round(m.cpu_seconds, 3)}
                | m.counters
                for m in outcome.moments
            ],
        }
        for outcome in outcomes
    ]


def _write_json(file: str, outcomes: list[Outcome]) -> None:
    import msgspec

    text = msgspec.json.format(msgspec.json.encode(as_json(outcomes)), indent=1) + b"\n"
    if file == "-":
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()
        return
    try:
        Path(file).write_bytes(text)
    except OSError as e:
        raise CommandError(f"cannot write {file}: {e.strerror}") from e


def _print(outcomes: list[Outcome]) -> None:
    from rich.console import Console
    from rich.table import Table

    seconds = outcomes[0].moments[-1].seconds
    table = Table(box=None, header_style="bold", title=f"{seconds:.0f} seconds recorded", title_justify="left")
    table.add_column("setting")
    for name in ("saved on average", "at the end", "CPU of a core", "copied again", "metadata", "passes"):
        table.add_column(name, justify="right")
    for outcome in outcomes:
        table.add_row(
            str(outcome.setting),
            f"{outcome.mean_saved / 2**20:,.1f} MiB",
            f"{outcome.moments[-1].bytes_saved / 2**20:,.1f} MiB",
            f"{100 * outcome.cpu_seconds / seconds:.2f} %",
            f"{outcome.pages_broken:,} pages",
            f"{outcome.metadata_bytes / 2**20:,.1f} MiB",
            f"{outcome.passes:,}",
        )
    Console(width=None if sys.stdout.isatty() else 1000, highlight=False).print(table)
