"""The `samepage` command: one module a subcommand, each a thin door to what does the work.

A subcommand is a class whose docstring is its help; `prepare_parser` adds its arguments, `run` does it and
returns the exit status.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Protocol

from samepage.commands import streams

RESERVE = 16 << 20
"""Bytes that unmerging and merging leave to others unless told otherwise."""


class CommandError(Exception):
    """Something the user can put right; printed as one line."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


class Command(Protocol):
    """A subcommand."""

    __doc__: str | None

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None: ...
    def run(self, args: argparse.Namespace) -> int: ...


COMMANDS = {
    "run": "run:Run",
    "daemon": "daemon:Daemon",
    "status": "status:Status",
    "top": "top:Top",
    "get": "knobs:Get",
    "set": "knobs:Set",
    "unmerge": "unmerge:Unmerge",
    "attach": "attach:Attach",
    "detach": "attach:Detach",
    "scan": "scan:Scan",
    "record": "record:Record",
    "simulate": "simulate:Simulate",
    "fleet": "fleet:Fleet",
    "policy": "policy:PolicyCommand",
    "doctor": "doctor:Doctor",
}
"""Each command: its module here, and its class there."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: this process's); returns the exit status."""
    streams.occupy()
    argv = sys.argv[1:] if argv is None else argv
    error: CommandError | OSError | None = None
    try:
        args = parser(argv[0] if argv else None).parse_args(argv)
        command: Command = args.command
        status = command.run(args)
    except SystemExit as e:  # argparse has said why
        status = int(e.code or 0)
    except (CommandError, OSError) as e:
        status, error = getattr(e, "status", 1), e
    except KeyboardInterrupt:
        status = 130
    lost = streams.flush()
    if (lost and not status) or (isinstance(error, OSError) and lost and error.errno == lost.errno):
        status, error = 1, lost
    if error and not isinstance(error, BrokenPipeError):  # whoever read our output has enough
        streams.say(_in_one_line(error))
    return status


def _in_one_line(error: CommandError | OSError) -> str:
    if not isinstance(error, OSError):
        return str(error)
    return (error.strerror or str(error)) + (f": {error.filename}" if error.filename else "")


def parser(name: str | None = None) -> argparse.ArgumentParser:
    """That of the whole command line; if `name` is that of a command, of this one alone: to load the others takes
    longer than most commands do."""
    whole = argparse.ArgumentParser(
        prog="samepage", description="Same-page merging in user space: equal memory pages of processes share one copy."
    )
    whole.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    subparsers = whole.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for each in [name] if name in COMMANDS else COMMANDS:
        module, _, kind = COMMANDS[each].partition(":")
        command: Command = getattr(importlib.import_module(f"samepage.commands.{module}"), kind)()
        doc = command.__doc__ or ""
        subparser = subparsers.add_parser(each, help=doc.partition("\n")[0].rstrip("."), description=doc)
        command.prepare_parser(subparser)
        subparser.set_defaults(command=command)
    return whole


class _Version(argparse.Action):
    """Looks the version up only when it is asked for: that takes longer than starting a command."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import samepage

        print(f"samepage {samepage.__version__}")
        parser.exit()


def add_socket(parser: argparse.ArgumentParser) -> None:
    """The option by which commands find the service."""
    parser.add_argument(
        "--socket",
        metavar="PATH",
        help="the service to talk to (default: $SAMEPAGE_SOCKET, else this user's daemon, else root's)",
    )


def add_reserve(parser: argparse.ArgumentParser) -> None:
    """The option that says how much memory unmerging and donating leave alone."""
    parser.add_argument(
        "--reserve",
        metavar="SIZE",
        type=size,
        default=RESERVE,
        help="memory that unmerging and merging leave to others: what must still be available, in the machine and in "
        "every memory cgroup of a process, when they have taken theirs (default: 16M)",
    )


def add_swap(parser: argparse.ArgumentParser) -> None:
    """The option that says how pages are swapped."""
    parser.add_argument(
        "--swap",
        choices=("move", "wp"),
        help="how pages are swapped under a program's threads: by UFFDIO_MOVE, which Linux 6.8 has (default: move), or "
        "by write-protection, which older kernels have, too, which is slower, and forbids the program huge pages",
    )


def add_mount(parser: argparse.ArgumentParser) -> None:
    """The option that shows the service to programs which know KSM."""
    parser.add_argument(
        "--mount",
        metavar="DIR",
        help="serve the files of /sys/kernel/mm/ksm in DIR, to be read and written as the kernel's are",
    )


SIZE_END = 1 << 63
"""No file and no memory is larger, and the agent is told sizes in 64 bits."""


def size(text: str) -> int:
    """The bytes that `text` says. A type for an argument of a parser."""
    shift = {"K": 10, "M": 20, "G": 30}.get(text[-1:].upper(), 0)
    digits = text[:-1] if shift else text
    if not (digits.isascii() and digits.isdecimal()) or not 0 < int(digits) << shift < SIZE_END:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size: write bytes, or a number and K, M or G, less than 2^63 bytes"
        )
    return int(digits) << shift
