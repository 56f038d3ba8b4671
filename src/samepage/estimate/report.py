"""What a scan says, as one value: the JSON of `samepage scan --json` is this, field by field (docs/scan.md).

Numbers are of pages (4096 bytes) where the name says nothing else, and names that end in `bytes` or `seconds` are
those."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np

from samepage.arrays import Bools, Ints
from samepage.estimate import predict
from samepage.estimate.groups import BLOCK, PageClass
from samepage.estimate.look import Look, MappingRows, SourceRows
from samepage.estimate.sample import Estimate
from samepage.estimate.source import Kind, Left, PageFlag
from samepage.ksmd.knobs import Knobs
from samepage.memory import PAGE_SIZE, U8

SCHEMA = 2
"""Goes up when a field changes its meaning or is removed."""

KSM_RMAP_ITEM_BYTES = 64
"""struct ksm_rmap_item on a 64-bit machine: one for each page KSM scans (mm/ksm.c)."""

KSM_STABLE_NODE_BYTES = 64
"""struct ksm_stable_node on a 64-bit machine (56 to 64 bytes, by configuration): one for each page merged."""

KSM_PASSES = 2
"""A page is merged when its checksum was the same in two passes."""

KSM_PAGE_SECONDS = 7.2e-6
"""ksmd's time for a page and a pass, merging included: 3.8 s for two passes over two processes with the same 512 MiB,
with pages_to_scan at 10 million and no sleep (Linux 6.18)."""

SAMEPAGE_PAGE_BYTES, SAMEPAGE_UNSHARED_BYTES, SAMEPAGE_NODE_BYTES = 9, 4, 13
"""samepage/ksmd: a page, more while it is in the unstable index, and a stable node."""

WORTH_A_THREAD = 16 << 20
"""Bytes that a program must have mapped before the agent starts a thread, unless it has a large allocation
(agent/thread/thread.c)."""

SAMEPAGE_EXTENT_SECONDS, SAMEPAGE_PAGE_SECONDS = 11.0e-6, 1.2e-6
"""samepage's time to swap an extent: 495 thousand pages/s in extents of 16 pages, 815 thousand in extents of 512, so
for each swap and each page in it (Linux 6.18, by move)."""

FORKED = "still shared by fork"
"""The reasons why pages are left alone that cost nothing as they are."""

PAIRS_MAX = 1000
"""The most pairs that are listed."""


class Pages(msgspec.Struct):
    """How many pages there are of each kind. `total` is the sum of `unique`, `zero`, both duplicates, `already_shared`
    and `unreadable`."""

    total: int
    unique: int
    zero: int
    duplicate_inside: int
    """Equal to a page of the same process, and of no other."""
    duplicate_between: int
    """Equal to a page of another process."""
    already_shared: int
    """Mapped from a frame that counts elsewhere, or is shared already."""
    unreadable: int
    huge: int
    """Of `total`: in huge pages."""
    huge_duplicate: int
    """Of both duplicates: in huge pages, which have to be split to merge them."""


class AlreadyShared(msgspec.Struct):
    """Pages that share a frame already, by how they came to. Their sum is `already_shared` of all sources."""

    fork: int
    ksm: int
    samepage: int
    zero_page: int


class ByPage(msgspec.Struct):
    """What the kernel's KSM would come to with all of it."""

    pages_shared: int
    pages_sharing: int
    ksm_zero_pages: int
    zero_in_huge: int
    """Pages of zeros that KSM frees, and does not count, by splitting the huge pages they are in."""
    saved_bytes: int
    """New savings."""
    saved_inside_bytes: int
    """Of them, what merging inside each process alone would save; the rest is between processes."""
    metadata_bytes: int
    """rmap_items and stable nodes, in the kernel."""
    as_set_seconds: float
    """Until all is merged, with pages_to_scan and sleep_millisecs as they are set now."""
    fastest_seconds: float
    """The same without any sleep; as much CPU time."""
    errors: dict[str, int] = {}
    """Of a sample: how far off an estimate may be, by name."""


class ByExtent(msgspec.Struct):
    """What samepage would come to: runs of pages, as many as `vm.max_map_count` has room for."""

    pages: int
    """Pages looked at for it."""
    pages_shared: int
    pages_sharing: int
    zero_pages: int
    """Pages of zeros, merged with the kernel's."""
    extents: int
    pages_per_extent: float
    left_for_budget: int
    """Duplicates left alone because their process would have too many mappings."""
    saved_bytes: int
    metadata_bytes: int
    seconds: float
    """CPU seconds to hash and merge all of it once."""
    errors: dict[str, int] = {}


class Blocks(msgspec.Struct):
    """Blocks of 64 KiB and more in heaps of glibc's malloc, which `samepage run` has begin with a page each."""

    count: int
    saved_bytes: int
    """What more of them is equal then, also to other memory that `samepage run` takes."""


class LeftAlone(msgspec.Struct):
    """Memory of processes that `samepage run` does not take."""

    reason: str
    pages: int
    duplicate: int
    """Of `pages`: zero, or equal to another page that is looked at."""


class MappingReport(msgspec.Struct):
    """A mapping, or a large allocation in one. Addresses in bytes."""

    kind: str
    name: str
    start: int
    end: int
    pages: Pages


class SourceReport(msgspec.Struct):
    """A process or a file. `pid` and `uid` are null for a file."""

    name: str
    pid: int | None
    uid: int | None
    pages: Pages
    swapped: int
    """Not in memory, and left there: not read, and not in `pages`."""
    mappings: list[MappingReport]


class Pair(msgspec.Struct):
    """Two sources, by their places in `sources`, and the bytes of content that both have, each in frames of its own."""

    a: int
    b: int
    bytes: int


class HostReport(msgspec.Struct):
    """The machine, and the settings that the prediction assumes."""

    kernel: str
    page_size: int
    max_page_sharing: int
    use_zero_pages: bool
    pages_to_scan: int
    sleep_millisecs: int
    max_map_count: int


class LookReport(msgspec.Struct):
    """What the look cost."""

    seconds: float
    cpu_seconds: float
    bytes_read: int
    sample: float | None
    """The share of pages that was kept; null: all."""
    unseen: int = 0
    """Of a sample: pages of contents that are frequent, and not in it. They are in `by_page` and `by_extent`, with an
    error; in `pages`, `sources` and `pairs`, which are the sample times what it stands for, they count as unique."""


class Watch(msgspec.Struct):
    """What stayed the same over several looks, of the pages that the last one found."""

    looks: int
    seconds: float
    """From the first look to the last."""
    unchanged: int
    duplicates: int
    """Both duplicates and zero, in the last look."""
    duplicates_unchanged: int
    by_page_saved_bytes: int
    """What KSM would save with the unchanged pages alone."""
    by_extent_saved_bytes: int


class Report(msgspec.Struct):
    """All of it."""

    schema: int
    version: str
    host: HostReport
    page_flags: str
    """"kpageflags": the kernel said of each page what it is. "unavailable": it does not, but to root; so pages that
    share a frame with others count as already shared, whoever the others are."""
    look: LookReport
    problems: list[str]
    pages: Pages
    already_shared: AlreadyShared
    by_page: ByPage
    by_extent: ByExtent
    """samepage, if all of the memory were registered with it."""
    samepage_run: ByExtent
    """samepage, as `samepage run` does it: large allocations, what programs map themselves, glibc's main heap, and what
    is advised MADV_MERGEABLE."""
    samepage_run_large: ByExtent
    """samepage, as `samepage run --memory large` does it: without the heap and what programs map themselves."""
    blocks: Blocks
    left_alone: list[LeftAlone]
    """What `samepage run` would not take, by reason, most duplicates first."""
    sources: list[SourceReport]
    pairs: list[Pair]
    """The pairs that have most in common, at most 1000."""
    watch: Watch | None = None


def build(look: Look, host: predict.Host, analysis: predict.Analysis, watch: Watch | None, version: str) -> Report:
    """The report of a look."""
    all_memory = predict.by_extent(look, host, Knobs().max_page_sharing)
    npages = np.bincount(look.blocks.moved_sources, minlength=len(look.sources)) * look.scale
    joins = np.array([_joins(rows, n * PAGE_SIZE) for rows, n in zip(look.sources, npages, strict=True)], np.bool_)
    taken = _taken(look, joins)
    run = predict.by_extent(look, host, Knobs().max_page_sharing, taken)
    large = predict.by_extent(look, host, Knobs().max_page_sharing, large_only=True)
    rate = look.pages_read / look.cpu_seconds if look.cpu_seconds and look.pages_read else 1e6
    sources, shared = [], np.zeros(4, np.int64)
    for rows in look.sources:
        report, kinds = _source(look, rows, analysis.classes)
        sources.append(report)
        shared += kinds
    return Report(
        schema=SCHEMA,
        version=version,
        host=HostReport(
            host.kernel,
            PAGE_SIZE,
            host.max_page_sharing,
            host.use_zero_pages,
            host.pages_to_scan,
            host.sleep_millisecs,
            host.max_map_count,
        ),
        page_flags="kpageflags" if look.frames_known else "unavailable",
        look=LookReport(
            round(look.seconds, 3),
            round(look.cpu_seconds, 3),
            look.pages_read * PAGE_SIZE,
            None if look.previous is None else 1 / look.scale,
            analysis.unseen,
        ),
        problems=look.problems,
        pages=_sum([source.pages for source in sources]),
        already_shared=AlreadyShared(*shared.tolist()),
        by_page=_by_page(analysis.by_page, host),
        by_extent=_by_extent(all_memory, rate),
        samepage_run=_by_extent(run, rate),
        samepage_run_large=_by_extent(large, rate),
        blocks=Blocks(look.blocks.count, predict.by_moving_blocks(look, taken, joins) * PAGE_SIZE),
        left_alone=_left_alone(sources, look, joins, int(shared[0])),
        sources=sources,
        pairs=_pairs(analysis),
        watch=watch,
    )


def watched(
    look: Look, host: predict.Host, analysis: predict.Analysis, same: Bools, looks: int, seconds: float
) -> Watch:
    """What stayed the same. `same`: the rows that did."""
    stable = predict.analyse(look, host, same)
    extents = predict.by_extent(look, host, Knobs().max_page_sharing, same)
    duplicates = np.isin(analysis.classes, [PageClass.ZERO, PageClass.INSIDE, PageClass.BETWEEN])
    return Watch(
        looks=looks,
        seconds=round(seconds, 1),
        unchanged=round(np.count_nonzero(same) * look.scale),
        duplicates=round(np.count_nonzero(duplicates) * look.scale),
        duplicates_unchanged=round(np.count_nonzero(duplicates & same) * look.scale),
        by_page_saved_bytes=stable.by_page.saved.pages * PAGE_SIZE,
        by_extent_saved_bytes=extents.saved.pages * PAGE_SIZE,
    )


def _errors(**estimates: Estimate) -> dict[str, int]:
    return {name: e.error * (PAGE_SIZE if name.endswith("bytes") else 1) for name, e in estimates.items() if e.error}


def _by_page(by_page: predict.ByPage, host: predict.Host) -> ByPage:
    items = by_page.rmap_items.pages * KSM_PASSES
    busy = items * KSM_PAGE_SECONDS
    return ByPage(
        pages_shared=by_page.pages_shared.pages,
        pages_sharing=by_page.pages_sharing.pages,
        ksm_zero_pages=by_page.ksm_zero_pages.pages,
        zero_in_huge=by_page.zero_in_huge.pages,
        saved_bytes=by_page.saved.pages * PAGE_SIZE,
        saved_inside_bytes=min(by_page.saved_inside.pages, by_page.saved.pages) * PAGE_SIZE,
        metadata_bytes=by_page.rmap_items.pages * KSM_RMAP_ITEM_BYTES
        + by_page.pages_shared.pages * KSM_STABLE_NODE_BYTES,
        as_set_seconds=round(busy + items / max(host.pages_to_scan, 1) * host.sleep_millisecs / 1000, 1),
        fastest_seconds=round(busy, 1),
        errors=_errors(
            pages_shared=by_page.pages_shared, pages_sharing=by_page.pages_sharing, saved_bytes=by_page.saved
        ),
    )


def _by_extent(by_extent: predict.ByExtent, rate: float) -> ByExtent:
    merged = by_extent.pages_shared.pages + by_extent.pages_sharing.pages
    unshared = max(by_extent.pages.pages - merged - by_extent.zero_pages.pages, 0)
    metadata = (
        by_extent.pages.pages * SAMEPAGE_PAGE_BYTES
        + unshared * SAMEPAGE_UNSHARED_BYTES
        + by_extent.pages_shared.pages * SAMEPAGE_NODE_BYTES
    )
    swaps = max(by_extent.extents.pages, merged / 512)
    seconds = by_extent.pages.pages / rate + swaps * SAMEPAGE_EXTENT_SECONDS + merged * SAMEPAGE_PAGE_SECONDS
    return ByExtent(
        pages=by_extent.pages.pages,
        pages_shared=by_extent.pages_shared.pages,
        pages_sharing=by_extent.pages_sharing.pages,
        zero_pages=by_extent.zero_pages.pages,
        extents=by_extent.extents.pages,
        pages_per_extent=round(by_extent.extent_pages, 1),
        left_for_budget=by_extent.left_for_budget.pages,
        saved_bytes=by_extent.saved.pages * PAGE_SIZE,
        metadata_bytes=metadata,
        seconds=round(seconds, 2),
        errors=_errors(
            pages_shared=by_extent.pages_shared, pages_sharing=by_extent.pages_sharing, saved_bytes=by_extent.saved
        ),
    )


# -- what pages are, by mapping -----------------------------------------------------------------------------------

_HUGE, _KSM, _ELSEWHERE = 8, 16, 32
"""Bits beside the class in what is counted."""


def _codes(look: Look, classes: U8, first: int, end: int) -> Ints:
    """How many rows there are of each class and each of the three flags that matter (64 counts)."""
    counts = np.zeros(64, np.int64)
    for at in range(first, end, BLOCK):
        to = min(at + BLOCK, end)
        flags = look.flags[at:to]
        code = classes[at:to].copy()
        for flag, bit in ((PageFlag.HUGE, _HUGE), (PageFlag.KSM, _KSM), (PageFlag.ELSEWHERE, _ELSEWHERE)):
            code[flags & flag != 0] |= np.uint8(bit)
        counts += np.bincount(code, minlength=64)
    return counts


_CODE = np.arange(64)
_CLASS = _CODE & 7


def _pages(counts: Ints, total: int, scale: float) -> Pages:
    known = int(counts[_CLASS != PageClass.UNIQUE].sum())
    # Of a sample only the total is counted, and the rest is an estimate, which may come to more.
    scale = min(scale, total / known) if known else scale

    def count(which: Bools) -> int:
        return round(int(counts[which].sum()) * scale)

    duplicate = (_CLASS == PageClass.INSIDE) | (_CLASS == PageClass.BETWEEN)
    huge = _CODE & _HUGE != 0
    zero, inside = count(_CLASS == PageClass.ZERO), count(_CLASS == PageClass.INSIDE)
    between, shared = count(_CLASS == PageClass.BETWEEN), count(_CLASS == PageClass.SHARED)
    unreadable = count(_CLASS == PageClass.UNREADABLE)
    unique = max(0, total - zero - inside - between - shared - unreadable)
    return Pages(
        total, unique, zero, inside, between, shared, unreadable, min(count(huge), total), count(huge & duplicate)
    )


def _sum(parts: list[Pages]) -> Pages:
    fields = Pages.__struct_fields__
    return Pages(*(sum(getattr(part, name) for part in parts) for name in fields))


def _source(look: Look, rows: SourceRows, classes: U8) -> tuple[SourceReport, Ints]:
    """Its report, and its pages that are shared already: by fork, by KSM, by samepage, with the page of zeros."""
    mappings, shared = [], np.zeros(4, np.int64)
    for part, first, end in _ranges(rows):
        counts = _codes(look, classes, first, end)
        mapping = part.mapping
        mappings.append(
            MappingReport(
                mapping.kind, mapping.name, mapping.start, mapping.end, _pages(counts, part.npages, look.scale)
            )
        )
        is_shared = _CLASS == PageClass.SHARED
        elsewhere = round(int(counts[is_shared & (_CODE & _ELSEWHERE != 0)].sum()) * look.scale)
        ksm = round(int(counts[is_shared & (_CODE & _ELSEWHERE == 0) & (_CODE & _KSM != 0)].sum()) * look.scale)
        shared[1] += ksm
        shared[2 if mapping.kind is Kind.SEGMENT else 3] += elsewhere
        shared[0] += max(0, mappings[-1].pages.already_shared - ksm - elsewhere)
    source = rows.source
    report = SourceReport(
        source.name, source.pid, source.uid, _sum([m.pages for m in mappings]), rows.swapped, mappings
    )
    return report, shared


def _joins(rows: SourceRows, blocks: float) -> bool:
    """Whether the agent would start a thread there. `blocks`: bytes in blocks of malloc's that it would serve."""
    mappings = [part.mapping for part in rows.mappings]
    size = sum(mapping.end - mapping.start for mapping in mappings if mapping.left is Left.LARGE_ONLY)
    return max(size, blocks) >= WORTH_A_THREAD or any(mapping.taken for mapping in mappings)


def _taken(look: Look, joins: Bools) -> Bools:
    """The rows that `samepage run` would take. `joins`: these sources have an agent's thread."""
    taken = np.zeros(look.rows, np.bool_)
    for rows, joined in zip(look.sources, joins, strict=True):
        for part, first, end in _ranges(rows):
            taken[first:end] = joined and (part.mapping.left is Left.LARGE_ONLY or part.mapping.taken)
    return taken


def _left_alone(sources: list[SourceReport], look: Look, joins: Bools, forked: int) -> list[LeftAlone]:
    """`forked`: pages that still are shared by fork, of which there is but one frame."""
    found = {FORKED: LeftAlone(FORKED, forked, 0)} if forked else {}
    for source, rows, joined in zip(sources, look.sources, joins, strict=True):
        for report, part in zip(source.mappings, rows.mappings, strict=True):
            left = part.mapping.left
            if left is Left.LARGE_ONLY:
                left = None if joined else Left.SMALL
            if left:
                row = found.setdefault(left, LeftAlone(left, 0, 0))
                pages = report.pages
                row.pages += pages.total - pages.already_shared
                row.duplicate += pages.zero + pages.duplicate_inside + pages.duplicate_between
    return sorted(found.values(), key=lambda row: row.duplicate, reverse=True)


def _ranges(rows: SourceRows) -> Iterator[tuple[MappingRows, int, int]]:
    """Each mapping, its first row, and where its rows end."""
    ends = [part.first for part in rows.mappings[1:]] + [rows.end]
    for part, end in zip(rows.mappings, ends, strict=True):
        yield part, part.first, end


def _pairs(analysis: predict.Analysis) -> list[Pair]:
    upper = np.triu(analysis.matrix, 1)
    a, b = np.nonzero(upper)
    order = np.argsort(-upper[a, b], kind="stable")[:PAIRS_MAX]
    names = analysis.matrix_sources
    return [Pair(int(names[a[i]]), int(names[b[i]]), round(float(upper[a[i], b[i]])) * PAGE_SIZE) for i in order]
