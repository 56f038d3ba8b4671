"""The report for a terminal."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from samepage.memory import PAGE_SIZE

if TYPE_CHECKING:
    from samepage.estimate.report import Pages, Report, SourceReport

ROWS = 15
"""Processes, and mappings, that are listed: the largest, by what they have that others have."""

PAIRS = 8

STYLES = {"unique": "bright_black", "zero": "cyan", "inside": "yellow", "between": "red", "shared": "green"}


def size(nbytes: float) -> str:
    """Bytes for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024 or unit == "GiB":
            return f"{nbytes:.0f} {unit}" if unit in ("B", "KiB") else f"{nbytes:,.1f} {unit}"
        nbytes /= 1024
    raise AssertionError


def duration(seconds: float) -> str:
    """Seconds for people: 3.4 s, 12 min, 2.5 h."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def print_report(report: Report, console: Console) -> None:
    """The tables, one after the other."""
    for part in _parts(report):
        console.print(part)
        console.print()


def headline(report: Report) -> str:
    """What most want to know, in one sentence."""
    pages = report.pages
    saved = max(report.by_page.saved_bytes, report.by_extent.saved_bytes)
    total = pages.total - pages.already_shared - pages.unreadable
    share = saved / (total * PAGE_SIZE) if total else 0
    processes = sum(source.pid is not None for source in report.sources)
    files = len(report.sources) - processes
    whose = " and ".join(
        f"{n} {what if n == 1 else many}"
        for n, what, many in ((processes, "process", "processes"), (files, "file", "files"))
        if n
    )
    sampled = f", of a sample of {report.look.sample:.3g}" if report.look.sample else ""
    return (
        f"Of {size(total * PAGE_SIZE)} in {whose}, merging would save {size(saved)} ({share:.0%}){sampled}; "
        f"{size(pages.already_shared * PAGE_SIZE)} more are shared already."
    )


def _parts(report: Report) -> list[RenderableType]:
    look = report.look
    rate = look.bytes_read / look.cpu_seconds / 2**30 if look.cpu_seconds else 0
    took = f"{size(look.bytes_read)} read in {look.seconds:.1f} s, {rate:.1f} GiB/s a core."
    parts: list[RenderableType] = [Group(Text(headline(report), style="bold"), Text(took, style="dim"))]
    if report.page_flags == "unavailable" and any(source.pid is not None for source in report.sources):
        parts.append(
            Text(
                "Page flags are root's: what shares a frame with others is taken for shared by fork, "
                "and what KSM merged is not told apart.",
                style="dim",
            )
        )
    if look.unseen:
        parts.append(
            Text(
                f"{size(look.unseen * PAGE_SIZE)} of frequent contents are not in the sample: "
                "by kind, process and mapping they count as unique."
            )
        )
    parts += [_kinds(report), _methods(report)]
    if report.blocks.saved_bytes >= 1 << 20:
        parts.append(
            Text(
                f"samepage run saves {size(report.blocks.saved_bytes)} besides: it has blocks of malloc's from 64 KiB "
                "on begin with a page, so that equal data is on equal pages."
            )
        )
    if report.left_alone:
        parts.append(_left_alone(report))
    if report.watch:
        parts.append(_watch(report))
    parts += [_processes(report), _mappings(report)]
    if report.pairs:
        parts.append(_pairs(report))
    return parts


def _table(*columns: str, left: int = 1, title: str | None = None) -> Table:
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", overflow="fold" if i < left else "ellipsis")
    return table


def _mib(pages: int) -> str:
    return f"{pages * PAGE_SIZE / 2**20:,.1f}"


def _kinds(report: Report) -> Table:
    pages, shared = report.pages, report.already_shared
    table = _table("what it is", "MiB", "pages", "%")
    rows = (
        ("all", pages.total, ""),
        ("unique", pages.unique, STYLES["unique"]),
        ("zero", pages.zero, STYLES["zero"]),
        ("duplicate inside one process", pages.duplicate_inside, STYLES["inside"]),
        ("duplicate between processes", pages.duplicate_between, STYLES["between"]),
        ("shared already: by fork", shared.fork, STYLES["shared"]),
        ("shared already: by the kernel's KSM", shared.ksm, STYLES["shared"]),
        ("shared already: by samepage", shared.samepage, STYLES["shared"]),
        ("shared already: the kernel's page of zeros", shared.zero_page, STYLES["shared"]),
        ("went away before it was read", pages.unreadable, ""),
        ("in huge pages: all", pages.huge, ""),
        ("in huge pages: duplicate", pages.huge_duplicate, ""),
    )
    always = {"all", "unique", "zero", "duplicate inside one process", "duplicate between processes"}
    for name, count, style in rows:
        if count or name in always:
            table.add_row(Text(name, style=style), _mib(count), f"{count:,}", f"{count / max(pages.total, 1):.1%}")
    return table


def _methods(report: Report) -> Table:
    table = _table("merged", "saves MiB", "shared", "sharing", "extents", "metadata", "CPU", "as set")
    table.columns[0].no_wrap = True
    ksm = report.by_page
    table.add_row(
        "by page, KSM",
        _saves(ksm.saved_bytes, ksm.errors),
        f"{ksm.pages_shared:,}",
        f"{ksm.pages_sharing:,}",
        "",
        size(ksm.metadata_bytes),
        duration(ksm.fastest_seconds),
        duration(ksm.as_set_seconds),
    )
    inside = ksm.saved_inside_bytes
    table.add_row("  inside processes", _saves(inside))
    table.add_row("  between them", _saves(ksm.saved_bytes - inside))
    for name, extent in (
        ("by extent, samepage", report.by_extent),
        ("samepage run", report.samepage_run),
        ("  with --memory large", report.samepage_run_large),
    ):
        table.add_row(
            name,
            _saves(extent.saved_bytes, extent.errors),
            f"{extent.pages_shared:,}",
            f"{extent.pages_sharing:,}",
            f"{extent.extents:,}",
            size(extent.metadata_bytes),
            duration(extent.seconds),
        )
        if extent.left_for_budget:
            table.add_row("  no mappings left for", _mib(extent.left_for_budget))
    return table


def _left_alone(report: Report) -> Table:
    table = _table("samepage run leaves alone", "MiB", "of it duplicate")
    for row in report.left_alone:
        table.add_row(row.reason, _mib(row.pages), _mib(row.duplicate))
    return table


def _saves(nbytes: int, errors: dict[str, int] | None = None) -> str:
    """MiB, and how far off that may be."""
    error = (errors or {}).get("saved_bytes", 0)
    return _mib(nbytes // PAGE_SIZE) + (f" ± {_mib(error // PAGE_SIZE)}" if error else "")


def _watch(report: Report) -> Text:
    watch = report.watch
    assert watch is not None
    share = watch.duplicates_unchanged / watch.duplicates if watch.duplicates else 1.0
    return Text(
        f"{share:.1%} of the duplicate and zero pages were unchanged over {watch.looks} looks in "
        f"{watch.seconds:.0f} s; with those alone, KSM would save {size(watch.by_page_saved_bytes)} and samepage "
        f"{size(watch.by_extent_saved_bytes)}."
    )


def _worth(pages: Pages) -> tuple[int, int]:
    return pages.zero + pages.duplicate_inside + pages.duplicate_between, pages.total


def _row(table: Table, pages: Pages, *names: str) -> None:
    table.add_row(
        *(Text(name) for name in names),  # a Text: a name is no markup
        _mib(pages.total),
        Text(_mib(pages.unique), style=STYLES["unique"]),
        Text(_mib(pages.zero), style=STYLES["zero"]),
        Text(_mib(pages.duplicate_inside), style=STYLES["inside"]),
        Text(_mib(pages.duplicate_between), style=STYLES["between"]),
        Text(_mib(pages.already_shared), style=STYLES["shared"]),
    )


COLUMNS = ("MiB", "unique", "zero", "inside", "between", "shared")


def _processes(report: Report) -> Group:
    table = _table("pid", "whose", *COLUMNS, left=2)
    ranked = sorted(report.sources, key=lambda source: _worth(source.pages), reverse=True)
    for source in ranked[:ROWS]:
        _row(table, source.pages, "" if source.pid is None else str(source.pid), source.name)
    return _with_rest(table, len(ranked) - ROWS, "more; --json has them all")


def _mappings(report: Report) -> Group:
    """By what they are, over all processes."""
    sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0] * 9)
    for source in report.sources:
        for mapping in source.mappings:
            entry = sums[mapping.kind, mapping.name]
            for i, name in enumerate(mapping.pages.__struct_fields__):
                entry[i] += getattr(mapping.pages, name)
    from samepage.estimate.report import Pages

    ranked = sorted(
        ((kind, name, Pages(*entry)) for (kind, name), entry in sums.items()),
        key=lambda row: _worth(row[2]),
        reverse=True,
    )
    ranked = [row for row in ranked if _worth(row[2])[0]] or ranked
    table = _table("mapping", "name", *COLUMNS, left=2)
    for kind, name, pages in ranked[:ROWS]:
        _row(table, pages, kind, "" if name == f"[{kind}]" else os.path.basename(name))
    return _with_rest(table, len(ranked) - ROWS, "more; --json has each by itself")


def _with_rest(table: Table, rest: int, what: str) -> Group:
    return Group(table, Text(f"and {rest} {what}", style="dim")) if rest > 0 else Group(table)


def _pairs(report: Report) -> Table:
    table = _table("who has most in common", "", "MiB", left=2)
    names = Counter(source.name for source in report.sources)
    for pair in report.pairs[:PAIRS]:
        a, b = (_label(report.sources[i], names) for i in (pair.a, pair.b))
        table.add_row(Text(a), Text(b), _mib(pair.bytes // PAGE_SIZE))
    return table


def _label(source: SourceReport, names: Counter[str]) -> str:
    if source.pid is not None:
        return f"{source.name} ({source.pid})"
    short = os.path.basename(source.name)
    return short if names[source.name] == 1 else source.name
