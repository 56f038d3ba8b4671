"""The report as a page to look at: one file, which opens offline and asks nobody for anything.

The page is page.html. The report and the map are put into it. The map shows the pages of every source in the order of
their addresses; a *cell* stands for a fixed number of pages, so that area is memory.
"""

from __future__ import annotations

import base64
import html
from importlib import resources
from typing import Any

import msgspec
import numpy as np

from samepage.estimate.groups import PageClass
from samepage.estimate.look import Look, SourceRows
from samepage.estimate.report import Pages, Report
from samepage.estimate.text import headline
from samepage.memory import PAGE_SIZE, U8

CELLS = 10_000
"""The map has about this many cells at most, however much memory there is."""

MAPPINGS = 12_000
"""How many mappings are named at most: the largest."""

COLOURED = (PageClass.ZERO, PageClass.INSIDE, PageClass.BETWEEN, PageClass.SHARED)
"""Classes that a cell has a byte for: their share of it, in 255ths. The rest is unique."""


class Cells(msgspec.Struct):
    """The map. `bytes` of memory a cell; for each source its cells, four bytes each, in base64."""

    bytes: int
    sources: list[str]


def cells(look: Look, classes: U8) -> Cells:
    """Cut the pages of a look into cells. `classes`: of each row."""
    total = sum(rows.npages for rows in look.sources)
    each = 1
    while total > each * CELLS:
        each *= 2
    # Of a sample, a row is several pages.
    step = max(1, round(each / look.scale))
    return Cells(round(step * look.scale) * PAGE_SIZE, [_cells(rows, classes, step) for rows in look.sources])


def _cells(rows: SourceRows, classes: U8, step: int) -> str:
    mine = classes[rows.first : rows.end]
    edges = np.arange(0, len(mine), step)
    if not len(edges):
        return ""
    size = np.diff(np.append(edges, len(mine)))
    shares = [np.add.reduceat((mine == kind).astype(np.int64), edges) * 255 // size for kind in COLOURED]
    return base64.b64encode(np.stack(shares, axis=1).astype(np.uint8).tobytes()).decode()


def page(report: Report, map_: Cells) -> str:
    """The whole page."""
    template = (resources.files("samepage.estimate") / "page.html").read_text(encoding="utf-8")
    data = {
        "report": msgspec.to_builtins(report) | {"sources": _sources(report)},
        "map": msgspec.to_builtins(map_),
        "headline": headline(report),
    }
    text = msgspec.json.encode(data).decode().replace("<", "\\u003c")  # a name must not be able to end the script
    return template.replace("{{headline}}", html.escape(headline(report))).replace("{{data}}", text)


def _sources(report: Report) -> list[dict[str, Any]]:
    """The sources, with their mappings as short rows: kind, name, start, first page, pages by what they are."""
    mappings = [(m.pages.total, s, n) for s, source in enumerate(report.sources) for n, m in enumerate(source.mappings)]
    named = {(s, n) for _, s, n in sorted(mappings, reverse=True)[:MAPPINGS]}
    out = []
    for s, source in enumerate(report.sources):
        rows, first = [], 0
        for n, m in enumerate(source.mappings):
            if (s, n) in named:
                rows.append([m.kind, m.name, f"{m.start:x}", first, *_row(m.pages)])
            first += m.pages.total
        out.append({"name": source.name, "pid": source.pid, "pages": _row(source.pages), "mappings": rows})
    return out


def _row(pages: Pages) -> list[int]:
    return [
        pages.total,
        pages.unique,
        pages.zero,
        pages.duplicate_inside,
        pages.duplicate_between,
        pages.already_shared,
    ]
