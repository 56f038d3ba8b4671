"""`samepage scan`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from samepage.commands import CommandError
from samepage.commands.streams import say

if TYPE_CHECKING:
    from samepage.estimate.look import Progress
    from samepage.estimate.process import PageFlags
    from samepage.estimate.report import Report
    from samepage.estimate.selection import Selection
    from samepage.estimate.source import Source


class Scan:
    """Find out what merging would save, without touching anything.

    Looks at the private anonymous memory of processes, as KSM would see it, at core dumps (ELF), raw memory images and
    memory files of virtual machines, and says which pages are equal, whose they are, and what merging them would save
    and cost. Nothing is stopped and nothing is changed. Processes of other users need root, and so do the kernel's page
    flags, without which pages that KSM merged cannot be told from those shared by fork.

    Ends with 1 when nothing could be looked at; what can be is reported, with a line on stderr for what cannot.
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        add_targets(parser)
        parser.add_argument("--json", metavar="FILE", help="write the report as JSON (docs/scan.md); -: to stdout")
        parser.add_argument(
            "--html", metavar="FILE", type=Path, help="write a page with a map of the memory, to look at"
        )
        parser.add_argument(
            "--watch", metavar="SECONDS", type=seconds, help="look again after so long, and say what stayed the same"
        )
        parser.add_argument(
            "--looks", metavar="N", type=_looks, help="with --watch: look N times in all, that far apart (default: 2)"
        )
        parser.add_argument(
            "--sample",
            metavar="FRACTION",
            type=fraction,
            help="keep only so much of what was seen, and say how far off that may be: less memory, not less reading",
        )
        self._parser = parser

    def run(self, args: argparse.Namespace) -> int:
        if not (args.targets or args.all or args.cgroup or args.name):
            self._parser.error("name a PID or FILE, or use --all, --cgroup or --name")
        if args.looks and not args.watch:
            self._parser.error("--looks needs --watch")
        # Before a scan of minutes, not after it.
        for file in filter(None, (args.html, None if args.json == "-" else args.json)):
            _check_writable(Path(file))

        from samepage.estimate.process import PageFlags

        page_flags = PageFlags()
        try:
            selection, problems = selected(args, page_flags)
            for problem in problems:
                say(problem)
            report, page = _scan(args, selection, problems)
        finally:
            page_flags.close()
        if not report.sources:
            if not report.problems:
                raise CommandError("there is no process to look at")
            return 1
        if page is not None:
            args.html.write_text(page, encoding="utf-8")
        if args.json:
            _write_json(args.json, report)
        if args.json != "-":
            _print(report)
        return 0


def add_targets(parser: argparse.ArgumentParser) -> None:
    """The arguments by which people say what is to be looked at."""
    parser.add_argument(
        "targets",
        metavar="PID|FILE",
        nargs="*",
        help="a process, or a memory image or core dump (a file named by a number: ./NUMBER)",
    )
    parser.add_argument("--all", action="store_true", help="every process that this user may look at")
    parser.add_argument(
        "--cgroup",
        metavar="PATH",
        action="append",
        default=[],
        help="the processes of a cgroup, and of those below it",
    )
    parser.add_argument(
        "--name",
        metavar="GLOB",
        action="append",
        default=[],
        help="processes with a name that matches a shell pattern; may be repeated, as --cgroup may",
    )


def seconds(text: str) -> float:
    """A type for an argument."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1e6:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")


def _looks(text: str) -> int:
    if text.isdecimal() and 2 <= int(text) <= 10_000:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of looks: 2 or more")


def fraction(text: str) -> float:
    """A type for an argument."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a fraction: more than 0, at most 1")


def _check_writable(file: Path) -> None:
    if file.is_dir() or not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
        raise CommandError(f"cannot write {file}")


def selected(args: argparse.Namespace, page_flags: PageFlags) -> tuple[Selection, list[str]]:
    """What was asked for, and what of it is not there."""
    from samepage.estimate.selection import Selection
    from samepage.estimate.source import ScanError

    selection = Selection(page_flags)
    problems = []
    for target in args.targets:
        selection.add(target)
    for add, values in ((selection.add_cgroup, args.cgroup), (selection.add_name, args.name)):
        for value in values:
            try:
                add(value)
            except ScanError as e:
                problems.append(str(e))
    if args.all:
        selection.add_all()
    return selection, problems


def _scan(args: argparse.Namespace, selection: Selection, problems: list[str]) -> tuple[Report, str | None]:
    """Look as often as asked, and the report of it, with its page if one is wanted."""
    import samepage
    from samepage.estimate import predict, report, watch
    from samepage.estimate.look import look

    sources, sample = selection.sources, args.sample if args.sample != 1 else None
    began = time.monotonic()
    latest, same = None, None
    for n in range((args.looks or 2) if args.watch else 1):
        if n:
            _wait(began + n * args.watch)
        started = time.monotonic()
        with _progress(sources, n) as progress:
            now = look(sources, selection.optional, sample, bool(args.watch), progress)
        for problem in now.problems:
            if problem not in problems:
                say(problem)
                problems.append(problem)
        if latest is not None:
            same = watch.unchanged(latest, now, same)
        latest, first = now, began if n else started
    assert latest is not None
    latest.problems = problems
    host = predict.this_host()
    analysis = predict.analyse(latest, host)
    watched = None
    if same is not None:
        watched = report.watched(latest, host, analysis, same, args.looks or 2, started - first)
    result = report.build(latest, host, analysis, watched, samepage.__version__)
    page = None
    if args.html and result.sources:
        from samepage.estimate import html

        page = html.page(result, html.cells(latest, analysis.classes))
    return result, page


def _wait(until: float) -> None:
    while (left := until - time.monotonic()) > 0:
        if sys.stderr.isatty():
            print(f"\r\x1b[Klooking again in {left:.0f} s", end="", file=sys.stderr, flush=True)
        time.sleep(min(left, 1))
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _progress(sources: list[Source], n: int) -> Iterator[Progress]:
    """A bar on stderr when somebody is looking at it."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    total = sum(source.expected_pages() for source in sources)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("looking" if not n else f"looking ({n + 1})", total=max(total, 1))
        yield lambda pages, name: bar.update(task, advance=pages, description=name[:30])


def _write_json(file: str, report: Report) -> None:
    import msgspec

    text = msgspec.json.format(msgspec.json.encode(report), indent=1)
    if file == "-":
        sys.stdout.buffer.write(text + b"\n")
        sys.stdout.buffer.flush()
    else:
        Path(file).write_bytes(text + b"\n")


def _print(report: Report) -> None:
    from rich.console import Console

    from samepage.estimate.text import print_report

    # When piped: no colours, and never cut to a width that nobody looks at.
    print_report(report, Console(width=None if sys.stdout.isatty() else 1000, highlight=False))
