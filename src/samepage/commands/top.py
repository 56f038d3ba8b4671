"""`samepage top`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from typing import Any

from samepage.commands import CommandError, add_socket
from samepage.commands.unmerge import how_far
from samepage.service import sockets


class Top:
    """Watch a service: what it saves and costs now, and each process, live in the terminal.

    Keys sort, stop merging and let it go on, and unmerge a process, after telling what that needs and whether it is
    there. No colours, and 80 by 24 are enough.
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        add_socket(parser)

    def run(self, args: argparse.Namespace) -> int:
        if importlib.util.find_spec("textual") is None:
            raise CommandError("samepage top needs the Python package textual: pip install 'samepage[top]'")
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise CommandError("samepage top needs a terminal; for scripts there is `samepage status --json`")
        from samepage.top.app import Top as App
        from samepage.top.source import Service

        source = Service(sockets.find(args.socket))
        source.look()  # where there is no service, one line says so
        app = App(source, _explain)
        app.run()
        return app.return_code or 0


def _explain(outcome: dict[str, Any]) -> str:
    if "pages_unmerged" not in outcome:
        return str(outcome.get("error", "the service did not answer"))
    return how_far(outcome) if outcome["errno"] else f"{outcome['pages_unmerged']} pages unmerged"
