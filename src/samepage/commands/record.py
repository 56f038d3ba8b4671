"""`samepage record`."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samepage.commands import size
from samepage.commands.extra import fleet_errors
from samepage.commands.scan import add_targets, fraction, seconds, selected
from samepage.commands.streams import say

if TYPE_CHECKING:
    from samepage.estimate.process import PageFlags
    from samepage.estimate.selection import Selection
    from samepage.fleet.record import Spent

KEY = "/etc/samepage/fleet.key"


class Record:
    """Write down what memory holds, again and again.

    Looks at processes, core dumps and memory images as `samepage scan` does, and writes a hash of each page to Parquet
    files in DIR, for `samepage simulate` and `samepage fleet`. Hashes are made with a key, without which a recording
    tells nobody what a machine holds; it must be the same on all hosts of a fleet. Goes on until it is ended (Ctrl-C,
    SIGTERM), and says then what it cost.
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        add_targets(parser)
        parser.add_argument("--every", metavar="SECONDS", type=seconds, default=3600.0, help="default: 3600")
        parser.add_argument("-o", "--output", metavar="DIR", type=Path, help="where to write; may have recordings")
        parser.add_argument("--looks", metavar="N", type=_count, help="end after so many")
        parser.add_argument(
            "--sample",
            metavar="FRACTION",
            type=fraction,
            default=0.01,
            help="keep so much of what was seen, by content, on all hosts the same (default: 0.01; 1 for simulations)",
        )
        parser.add_argument(
            "--cpu", metavar="PERCENT", type=_percent, default=1.0, help="of a core, at most: looks rarer (default: 1)"
        )
        parser.add_argument(
            "--daily", metavar="SIZE", type=size, default=64 << 20, help="written a day, at most (default: 64M)"
        )
        parser.add_argument("--host", metavar="NAME", default=socket.gethostname(), help="default: the host's own name")
        parser.add_argument("--key", metavar="FILE", type=Path, default=Path(KEY), help=f"default: {KEY}")
        parser.add_argument(
            "--new-key", action="store_true", help="make the key of a new fleet, once, to be copied to all its hosts"
        )
        parser.add_argument("--json", metavar="FILE", help="what it cost, as JSON, at the end; -: to stdout")
        self._parser = parser

    def run(self, args: argparse.Namespace) -> int:
        if args.new_key:
            return _new_key(args.key)
        if not (args.targets or args.all or args.cgroup or args.name):
            self._parser.error("name a PID or FILE, or use --all, --cgroup or --name")
        if args.output is None:
            self._parser.error("say where to write: -o DIR")
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", args.host):
            self._parser.error(f"{args.host!r} cannot be a host's name")
        with fleet_errors():
            spent = _record(args)
        _tell(spent, args)
        return 0 if spent.pages else 1


def _count(text: str) -> int:
    if text.isdecimal() and 1 <= int(text) <= 10_000_000:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of looks: 1 or more")


def _percent(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 100_000:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a percentage")


def _new_key(path: Path) -> int:
    from samepage.fleet import key

    with fleet_errors():
        made = key.make(path)
    print(f"{path} is the key {made.name}. Copy it to every host of the fleet, and nowhere else.")
    return 0


def _record(args: argparse.Namespace) -> Spent:
    from samepage.estimate.process import PageFlags
    from samepage.fleet.key import load
    from samepage.fleet.record import Budget, Spent, record
    from samepage.fleet.schema import check_writable

    key = load(args.key)
    check_writable(args.output)
    os.nice(10)  # whatever else is to be done comes first
    page_flags = PageFlags()
    problems: set[str] = set()
    spent = Spent()
    looking = record(
        lambda: _select(args, page_flags, problems),
        args.output,
        key,
        args.host,
        args.every,
        args.sample,
        Budget(args.cpu / 100, args.daily),
        say,
    )
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for spent in looking:
            if args.looks == spent.looks:
                break
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
        page_flags.close()
    return spent


def _select(args: argparse.Namespace, page_flags: PageFlags, problems: set[str]) -> Selection:
    selection, found = selected(args, page_flags)
    for problem in set(found) - problems:
        say(problem)
    problems.update(found)
    return selection


def _tell(spent: Spent, args: argparse.Namespace) -> None:
    cost: dict[str, Any] = {
        "looks": spent.looks,
        "pages_read": spent.pages,
        "seconds": round(spent.seconds, 3),
        "cpu_seconds": round(spent.cpu_seconds, 3),
        "core_percent": round(100 * spent.core, 3),
        "bytes_written": spent.bytes_written,
        "bytes_a_day": spent.daily,
        "sample": args.sample,
        "problems": spent.problems,
    }
    if args.json:
        import msgspec

        text = msgspec.json.format(msgspec.json.encode(cost), indent=1) + b"\n"
        if args.json == "-":
            sys.stdout.buffer.write(text)
            sys.stdout.buffer.flush()
        else:
            Path(args.json).write_bytes(text)
    if args.json != "-":
        looks = "1 look" if spent.looks == 1 else f"{spent.looks} looks"
        print(
            f"{looks}, {spent.bytes_written / 2**20:.1f} MiB written: {100 * spent.core:.2f} % of a core, and "
            f"{spent.daily / 2**20:.1f} MiB a day at this rate."
        )
