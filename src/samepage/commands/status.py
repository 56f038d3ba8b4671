"""`samepage status`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from samepage.commands import add_socket
from samepage.doctor.findings import not_swapped
from samepage.service import sockets

if TYPE_CHECKING:
    from rich.table import Table


class Status:
    """Show what is saved: the counters, then a row for every process, which says what engine serves it.

    The counters carry KSM's names and mean what Documentation/admin-guide/mm/ksm.rst of the kernel says. The last table
    has for every memory cgroup the bytes that would be needed if all merged pages in it were written at once, and
    those that are available there.
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        add_socket(parser)
        parser.add_argument("--json", action="store_true", help="print one JSON object")

    def run(self, args: argparse.Namespace) -> int:
        from samepage.service.control import Client

        with Client(sockets.find(args.socket)) as client:
            answer = client.ask("status")
        lists = {name: answer.get(name, []) for name in ("processes", "cgroups")}
        engines = answer["engines"]
        status = answer["counters"] | ({"engines": engines} if len(engines) > 1 else {}) | lists
        if args.json:
            print(json.dumps(status, indent=1))
        else:
            _print(engines, lists)
            if why := not_swapped(row["swap"] for row in lists["processes"] if "swap" in row):
                print(f"\n{why}")
        return 0


def _print(engines: dict[str, dict[str, Any]], lists: dict[str, list[dict[str, Any]]]) -> None:
    from rich.console import Console

    # When piped: no colours, and never cut to a width that nobody looks at.
    console = Console(width=None if sys.stdout.isatty() else 1000, highlight=False)
    names = dict.fromkeys(name for counters in engines.values() for name in counters)
    heads = list(engines) if len(engines) > 1 else ["value"]
    rows = [{"counter": name} | _values(name, heads, engines) for name in names]
    console.print(_table(rows))
    if not lists["processes"]:
        console.print("\nno process has joined")
    for rows in filter(None, lists.values()):
        console.print()
        console.print(_table(rows))


def _values(name: str, heads: list[str], engines: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {head: counters.get(name, "") for head, counters in zip(heads, engines.values(), strict=True)}


def _table(rows: list[dict[str, Any]]) -> Table:
    """A column for each name in any of the rows."""
    from rich.table import Table
    from rich.text import Text

    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*names, box=None, pad_edge=False)
    for column, name in zip(table.columns, names, strict=True):
        column.justify = "right" if any(isinstance(row.get(name), int) for row in rows) else "left"
    for row in rows:
        table.add_row(*(Text(str(row.get(name, ""))) for name in names))  # a Text: a name is no markup
    return table
