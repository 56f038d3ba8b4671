"""`samepage get` and `samepage set`."""

from __future__ import annotations

import argparse
import textwrap

from samepage.commands import add_socket
from samepage.service import sockets


class _WithKnobs(argparse.HelpFormatter):
    """Help that ends with all knobs. They are loaded, and numpy with them, only if somebody asks for it."""

    def format_help(self) -> str:
        from samepage.ksmd.knobs import KNOBS

        lines = ["", "knobs:"]
        for knob in KNOBS.values():
            lines.append(f"  {knob.name} {knob.range} (default: {knob.default})")
            lines.append(textwrap.fill(knob.help, self._width, initial_indent=" " * 6, subsequent_indent=" " * 6))
        return super().format_help() + "\n".join(lines) + "\n"


class Get:
    """Print what a knob is set to, or all of them. `samepage set --help` says what each means."""

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        add_socket(parser)
        parser.add_argument("knob", metavar="KNOB", nargs="?")

    def run(self, args: argparse.Namespace) -> int:
        from samepage.service.control import Client

        with Client(sockets.find(args.socket)) as client:
            knobs = client.ask("get", knob=args.knob)["knobs"]
        if args.knob:
            print(knobs[args.knob])
        else:
            for knob, value in knobs.items():
                print(f"{knob} {value}")
        return 0


class Set:
    """Change a knob of ksmd.

    `set run 2` unmerges everything and returns when that is done; when it fails, run is 0.
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        add_socket(parser)
        parser.add_argument("knob", metavar="KNOB", help="one of those below")
        parser.add_argument("value", metavar="VALUE")
        parser.formatter_class = _WithKnobs

    def run(self, args: argparse.Namespace) -> int:
        from samepage.service.control import Client

        # No timeout: `run` = 2 takes as long as copying all that is merged.
        with Client(sockets.find(args.socket), timeout=None) as client:
            client.ask("set", knob=args.knob, value=args.value)
        return 0
