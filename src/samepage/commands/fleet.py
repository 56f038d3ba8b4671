"""`samepage fleet`."""

from __future__ import annotations

import argparse
import mmap
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samepage.commands import size
from samepage.commands.extra import fleet_errors

if TYPE_CHECKING:
    from samepage.fleet.advice import Advice
    from samepage.fleet.queries import Answers

ROWS = 10


class Fleet:
    """Say what many hosts have in common, and which workloads belong together.

    Reads the last look of each host in recordings of `samepage record`: how much is duplicate within hosts and between
    them, by service, program and library; which services share most; and on which hosts to put workloads (a service on
    a host) so that merging saves most, with room for all of them unmerged.
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("directories", metavar="DIR", type=Path, nargs="+", help="recordings")
        parser.add_argument(
            "--memory",
            metavar="SIZE",
            type=size,
            default=4 << 30,
            help="of the queries; the rest goes to disk (default: 4G)",
        )
        parser.add_argument(
            "--host-memory",
            metavar="SIZE",
            type=size,
            help="room for workloads on each host (default: the memory that it was recorded with)",
        )
        parser.add_argument("--no-placement", action="store_true", help="only what is duplicate")
        parser.add_argument("--json", metavar="FILE", help="all of it, as JSON; -: to stdout, without the tables")

    def run(self, args: argparse.Namespace) -> int:
        with fleet_errors():
            answers, advice = _answers(args)
        if args.json:
            _write_json(args.json, answers, advice)
        if args.json != "-":
            _print(answers, advice)
        return 0


def _answers(args: argparse.Namespace) -> tuple[Answers, Advice | None]:
    from samepage.fleet import advice, queries, schema

    looks = queries.latest(schema.looks(args.directories))
    with tempfile.TemporaryDirectory(prefix="samepage-fleet-") as directory:
        fleet = queries.Fleet(queries.duckdb(looks, args.memory, Path(directory)), looks[0].head.fraction)
        answers = fleet.ask()
        if args.no_placement:
            return answers, None
        return answers, advice.advise(fleet, answers, args.host_memory)


def _write_json(file: str, answers: Answers, advice: Advice | None) -> None:
    import msgspec

    found: dict[str, Any] = msgspec.to_builtins(answers) | {
        "within": answers.within,
        "between": answers.between,
        "placement": msgspec.to_builtins(advice),
    }
    text = msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n"
    if file == "-":
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()
    else:
        Path(file).write_bytes(text)


def _print(answers: Answers, advice: Advice | None) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 1000, highlight=False)

    def gib(pages: float) -> str:
        return f"{pages / answers.fraction * mmap.PAGESIZE / 2**30:,.2f} GiB"

    where = "1 host" if len(answers.hosts) == 1 else f"{len(answers.hosts):,} hosts"
    console.print(
        f"{gib(answers.pages)} on {where}: {gib(answers.within)} are duplicate within hosts, and "
        f"{gib(answers.between)} between them."
    )
    for what in ("hosts", "services", "images", "libraries"):
        table = Table(box=None, header_style="bold")
        table.add_column(what)
        for name in ("memory", "duplicate"):
            table.add_column(name, justify="right")
        for amount in getattr(answers, what)[:ROWS]:
            table.add_row(amount.name, gib(amount.pages), gib(amount.duplicate))
        console.print(table)
    for what in ("pairs", "groups"):
        table = Table(box=None, header_style="bold")
        table.add_column(f"{what} of services that share most")
        table.add_column("in common", justify="right")
        for together in getattr(answers, what)[:ROWS]:
            table.add_row(", ".join(together.services), gib(together.contents))
        console.print(table)
    if advice is not None:
        table = Table(box=None, header_style="bold")
        table.add_column("placement")
        table.add_column("saved between workloads", justify="right")
        table.add_column("moves", justify="right")
        for plan in advice.plans:
            table.add_row(plan.name, gib(plan.saved), f"{plan.moves:,}")
        table.add_row("no placement saves more than", gib(advice.bound), "")
        console.print(table)
        for move in advice.moves[:ROWS]:
            console.print(f"move {move.service} from {move.host} to {move.to}")
        if len(advice.moves) > ROWS:
            console.print(f"and {len(advice.moves) - ROWS:,} more (--json)")
