"""`samepage get` and `samepage set`."""

from __future__ import annotations

import argparse

from samepage.commands import add_socket
from samepage.service import sockets


class Get:
    """Print what a knob is set to, or all of them.

    The knobs mean what Documentation/admin-guide/mm/ksm.rst of the kernel says.
    """

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
        parser.add_argument("knob", metavar="KNOB")
        parser.add_argument("value", metavar="VALUE")

    def run(self, args: argparse.Namespace) -> int:
        from samepage.service.control import Client

        # No timeout: `run` = 2 takes as long as copying all that is merged.
        with Client(sockets.find(args.socket), timeout=None) as client:
            client.ask("set", knob=args.knob, value=args.value)
        return 0
