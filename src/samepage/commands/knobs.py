"""`samepage get` and `samepage set`."""

from __future__ import annotations

import argparse
import textwrap

from samepage.commands import add_socket, engines


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
        engines.add_engine(parser, "whose knobs: those of the service (default)")
        parser.add_argument("knob", metavar="KNOB", nargs="?")
        self._parser = parser

    def run(self, args: argparse.Namespace) -> int:
        with engines.chosen(self._parser, args) as engine:
            if args.knob:
                print(engine.get(args.knob))
            else:
                for knob, value in engine.knobs().items():
                    print(f"{knob} {value}")
        return 0


class Set:
    """Change a knob of ksmd.

    `set run 2` unmerges everything and returns when that is done; when it fails, run is 0. The same is true with
    --engine kernel: samepage never writes 2 to /sys/kernel/mm/ksm/run, because that ends in the OOM killer.
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        add_socket(parser)
        engines.add_engine(parser, "whose knob: one of the service's (default)")
        parser.add_argument("knob", metavar="KNOB", help="one of those below")
        parser.add_argument("value", metavar="VALUE")
        parser.formatter_class = _WithKnobs
        self._parser = parser

    def run(self, args: argparse.Namespace) -> int:
        with engines.chosen(self._parser, args) as engine:
            engine.set(args.knob, args.value, lambda: False)  # Ctrl-C ends this process, and what was done stays done
        return 0
