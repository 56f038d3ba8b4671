"""`samepage status`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from samepage.commands import add_socket
from samepage.doctor.findings import not_swapped
from samepage.service import sockets


class Status:
    """Show what is saved: the counters, then a row for every process.

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
        status = answer["counters"] | lists
        if args.json:
            print(json.dumps(status, indent=1))
        else:
            _print(answer["counters"], lists)
            if why := not_swapped(row["swap"] for row in lists["processes"]):
                print(f"\n{why}")
        return 0


def _print(counters: dict[str, int], lists: dict[str, list[dict[str, Any]]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # When piped: no colours, and never cut to a width that nobody looks at.
    console = Console(width=None if sys.stdout.isatty() else 1000, highlight=False)
    table = Table("counter", "value", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name, value in counters.items():
        table.add_row(name, str(value))
    console.print(table)
    if not lists["processes"]:
        console.print("\nno process has joined")
    for rows in filter(None, lists.values()):
        console.print()
        table = Table(*rows[0], box=None, pad_edge=False)
        for column, value in zip(table.columns, rows[0].values(), strict=True):
            column.justify = "right" if isinstance(value, int) else "left"
        for row in rows:
            table.add_row(*(Text(str(value)) for value in row.values()))  # a Text: a name is no markup
        console.print(table)
