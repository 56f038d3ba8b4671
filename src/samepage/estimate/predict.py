"""What merging would come to: by page, as the kernel's KSM does it, and by extent, as samepage does.

It works out what becomes of each group of equal pages, and adds that up. For a sample, `Tally` estimates the sums, and
says how far off they may be.
"""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from samepage.arrays import Bools, Ints
from samepage.estimate.groups import (
    BLOCK,
    Groups,
    base_classes,
    distinct_frames,
    equal_groups,
    has_content,
    mark_duplicates,
    representative,
)
from samepage.estimate.look import Look, SourceRows
from samepage.estimate.pages import zero_checksum
from samepage.estimate.sample import Counts, Estimate, Tally
from samepage.estimate.source import PageFlag
from samepage.ksmd.budget import affordable
from samepage.ksmd.stable import SEGMENT_PAGES
from samepage.memory import U8, U32, U64

KSM = Path("/sys/kernel/mm/ksm")

MATRIX_SOURCES = 256
"""How many sources the matrix of who shares with whom has: those with the most pages."""

NOBODY = np.uint32(0xFFFFFFFF)


@dataclass(slots=True, frozen=True)
class Host:
    """What of the machine decides how much can be merged. The knobs are KSM's, as they are set now, or their
    defaults."""

    kernel: str
    max_page_sharing: int
    use_zero_pages: bool
    pages_to_scan: int
    sleep_millisecs: int
    max_map_count: int

    @property
    def splits_to_zero_page(self) -> bool:
        """Whether pages of zeros in a huge page become the kernel's page of zeros when it is split, which KSM does
        before it merges any page of one. Since Linux 6.12 (try_to_map_unused_to_zeropage in mm/migrate.c)."""
        found = re.match(r"(\d+)\.(\d+)", self.kernel)
        return found is not None and (int(found[1]), int(found[2])) >= (6, 12)

    @property
    def mappings_allowed(self) -> int:
        """How many mappings samepage lets a process have: a third of the kernel's limit is left to itself."""
        return self.max_map_count - self.max_map_count // 3


def this_host() -> Host:
    """This machine, as it is set now."""
    return Host(
        kernel=os.uname().release,
        max_page_sharing=_number(KSM / "max_page_sharing", 256),
        use_zero_pages=bool(_number(KSM / "use_zero_pages", 0)),
        pages_to_scan=_number(KSM / "pages_to_scan", 100),
        sleep_millisecs=_number(KSM / "sleep_millisecs", 20),
        max_map_count=_number(Path("/proc/sys/vm/max_map_count"), 65530),
    )


def _number(file: Path, default: int) -> int:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return default


# -- by page: the kernel's KSM ------------------------------------------------------------------------------------


@dataclass(slots=True)
class ByPage:
    """What KSM would come to with all that was looked at. `pages_shared`, `pages_sharing` and `ksm_zero_pages` are its
    counters, and count pages that are shared by fork, or merged by KSM, already. `saved` is what would be new."""

    pages_shared: Estimate
    pages_sharing: Estimate
    ksm_zero_pages: Estimate
    zero_in_huge: Estimate
    """Pages of zeros that go when the huge page they are in is split; KSM does not count them."""
    saved: Estimate
    saved_inside: Estimate
    """Of `saved`: what merging inside each process alone would save."""
    rmap_items: Estimate
    """Pages KSM has to keep count of."""


@dataclass(slots=True)
class Analysis:
    """Every page's class, who shares with whom, and what KSM would make of it."""

    classes: U8
    by_page: ByPage
    unseen: int
    """Of a sample: pages whose content is so frequent that it is known of, but is not in it."""
    matrix: npt.NDArray[np.float64]
    """Contents that two sources both have, in pages: of `matrix_sources` and `matrix_sources`."""
    matrix_sources: Ints


def ksm_nodes(pages: Ints, limit: int) -> tuple[Ints, Ints]:
    """How many stable nodes KSM makes for so many equal pages, and how many pages are left (one, alone beside full
    nodes). A node takes `max_page_sharing` pages, and it takes two to make one (stable_node_dup in mm/ksm.c)."""
    rest = pages % limit
    return pages // limit + (rest >= 2), (rest == 1).astype(np.int64)


def analyse(look: Look, host: Host, among: Bools | None = None) -> Analysis:
    """Compare all pages. `among`: only these rows count (those that stayed the same)."""
    checksum, flags = look.checksum, look.flags
    zero = np.uint64(zero_checksum())
    classes = base_classes(checksum, flags, int(zero))
    member = has_content(flags)
    if among is not None:
        member &= among
    sources = _matrix_sources(look)
    place = np.full(len(look.sources), -1, np.int64)
    place[sources] = np.arange(len(sources))
    matrix = np.zeros((len(sources), len(sources)))
    tally = Tally(look.scale, look.every, lambda size: _large_group(size, host))
    zeros, lonely_ksm = _Zeros(), 0
    for groups in equal_groups(checksum, member):
        source = look.source_of(groups.rows)
        distinct = distinct_frames(groups, flags, look.frames_known)
        mark_duplicates(groups, classes, flags, source, distinct, look.frames_known)
        own = representative(flags[groups.rows])
        key = checksum[groups.rows[groups.first]]
        merged_now = groups.sum((flags[groups.rows] & (PageFlag.KSM | PageFlag.FRAME)) == PageFlag.KSM | PageFlag.FRAME)
        counts = _group_counts(groups, own, source, distinct, merged_now, host)
        is_zero = key == zero
        if is_zero.any():
            g = int(np.flatnonzero(is_zero)[0])
            zeros.see(flags[groups.rows[groups.first[g] :][: groups.size[g]]])
        tally.add(key[~is_zero], {name: values[~is_zero] for name, values in counts.items()})
        lonely_ksm -= int(merged_now.sum())
        _add_pairs(matrix, groups, own, source, place)
    lonely_ksm += int(np.count_nonzero((flags & (PageFlag.KSM | PageFlag.FRAME)) == PageFlag.KSM | PageFlag.FRAME))
    items = np.count_nonzero(member)
    return Analysis(
        classes=classes,
        by_page=_by_page(tally, zeros.outcome(host, look.scale), max(lonely_ksm, 0), round(items * look.scale)),
        unseen=tally.unseen,
        matrix=matrix * look.scale,
        matrix_sources=sources,
    )


def _by_page(tally: Tally, zeros: dict[str, float], lonely_ksm: int, items: int) -> ByPage:
    def total(name: str, more: float = 0.0) -> Estimate:
        estimate = tally.total(name)
        return Estimate(round(estimate.pages + more), estimate.error)

    return ByPage(
        pages_shared=total("pages_shared", zeros["pages_shared"] + lonely_ksm),
        pages_sharing=total("pages_sharing", zeros["pages_sharing"]),
        ksm_zero_pages=Estimate(round(zeros["ksm_zero_pages"])),
        zero_in_huge=Estimate(round(zeros["zero_in_huge"])),
        saved=total("saved", zeros["saved"]),
        saved_inside=total("saved_inside", zeros["saved"]),
        rmap_items=Estimate(items),
    )


def _group_counts(groups: Groups, own: Bools, source: Ints, distinct: Ints, ksm_frames: Ints, host: Host) -> Counts:
    free = groups.sum(own)
    merges = (distinct >= 2) | (ksm_frames >= 1)
    nodes, left = ksm_nodes(groups.size, host.max_page_sharing)
    # A node that is not there yet takes one of the frames that could have been freed, for all that is known.
    saved = np.maximum(free - np.maximum(nodes - ksm_frames, 0) - left, 0)
    starts = np.zeros(len(groups.rows), np.bool_)
    mine = np.flatnonzero(own)
    group = groups.spread(np.arange(len(groups.first)))
    starts[mine] = (np.diff(source[mine], prepend=-1) != 0) | (np.diff(group[mine], prepend=-1) != 0)
    inside = np.where(distinct >= 2, free - groups.sum(starts), 0)
    return {
        "pages_shared": np.where(merges, nodes, 0),
        "pages_sharing": np.where(merges, groups.size - nodes - left, 0),
        "saved": np.where(merges, saved, 0),
        "saved_inside": np.minimum(inside, np.where(merges, saved, 0)),
    }


def _large_group(size: Ints, host: Host) -> Counts:
    """A large group that is not in the sample, of which only the size is known."""
    nodes, left = ksm_nodes(size, host.max_page_sharing)
    nothing = np.zeros(len(size), np.int64)
    return {
        "pages_shared": nodes,
        "pages_sharing": size - nodes - left,
        "saved": np.maximum(size - nodes - left, 0),
        "saved_inside": nothing,
    }


@dataclass(slots=True)
class _Zeros:
    """The group of pages of zeros, of which there is one."""

    pages: int = 0
    free: int = 0
    huge: int = 0
    huge_free: int = 0

    def see(self, flags: U8) -> None:
        own, huge = representative(flags), flags & PageFlag.HUGE != 0
        self.pages, self.free = len(flags), int(own.sum())
        self.huge, self.huge_free = int(huge.sum()), int((own & huge).sum())

    def outcome(self, host: Host, scale: float) -> dict[str, float]:
        """What KSM makes of them."""
        pages, free, huge, huge_free = (round(n * scale) for n in (self.pages, self.free, self.huge, self.huge_free))
        if not host.splits_to_zero_page:
            huge = huge_free = 0
        pages, free = pages - huge, free - huge_free
        if host.use_zero_pages:
            return {
                "pages_shared": 0,
                "pages_sharing": 0,
                "ksm_zero_pages": pages,
                "zero_in_huge": huge,
                "saved": free + huge_free,
            }
        nodes, left = (int(n[0]) for n in ksm_nodes(np.array([pages]), host.max_page_sharing))
        return {
            "pages_shared": nodes,
            "pages_sharing": pages - nodes - left,
            "ksm_zero_pages": 0,
            "zero_in_huge": huge,
            "saved": max(free - nodes - left, 0) + huge_free,
        }


def _matrix_sources(look: Look) -> Ints:
    """The sources that the matrix has, ascending."""
    sizes = np.array([rows.npages for rows in look.sources], np.int64)
    return np.sort(np.argsort(-sizes, kind="stable")[:MATRIX_SOURCES])


def _add_pairs(matrix: npt.NDArray[np.float64], groups: Groups, own: Bools, source: Ints, place: Ints) -> None:
    """For each two sources, count the groups that both have pages of, of frames of their own."""
    if not len(matrix):
        return
    group = groups.spread(np.arange(len(groups.first)))[own]
    column = place[source[own]]
    group, column = group[column >= 0], column[column >= 0]
    step = max(1, min(len(groups.first), (1 << 18) // len(matrix)))
    edges = np.searchsorted(group, np.arange(0, len(groups.first) + step, step))
    for n, (start, end) in enumerate(itertools.pairwise(edges.tolist())):
        if start < end:
            has = np.zeros((step, len(matrix)), np.float32)
            has[group[start:end] - n * step, column[start:end]] = 1
            matrix += has.T @ has


# -- by extent: samepage ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class ByExtent:
    """What samepage would come to. An extent is a run of pages whose neighbours are equal to neighbours, too."""

    pages: Estimate
    """Pages considered."""
    pages_shared: Estimate
    pages_sharing: Estimate
    zero_pages: Estimate
    extents: Estimate
    left_for_budget: Estimate
    """Pages not merged because the process has not mappings enough (vm.max_map_count)."""
    saved: Estimate
    extent_pages: float
    """Pages an extent, on average."""


def by_extent(look: Look, host: Host, limit: int, among: Bools | None = None, large_only: bool = False) -> ByExtent:
    """What samepage would merge, `limit` pages with one copy, users apart from each other. `among`: only these rows
    count. `large_only`: only what `samepage run --memory large` would take."""
    checksum = look.checksum
    member = np.empty(look.rows, np.bool_)
    zeros = 0
    for at in range(0, look.rows, BLOCK):
        part = slice(at, at + BLOCK)
        own = representative(look.flags[part])
        if among is not None:
            own &= among[part]
        if large_only:
            own &= look.flags[part] & PageFlag.TAKEN != 0
        zero = own & (checksum[part] == np.uint64(zero_checksum()))
        zeros += int(np.count_nonzero(zero))
        member[part] = own & ~zero
    nzero = round(zeros * look.scale)
    salts = _salts(look)
    target = np.full(look.rows, NOBODY, np.uint32)
    tally = Tally(look.scale, look.every, lambda size: _copies(size, limit))
    _salt(look, salts)
    try:
        for groups in equal_groups(checksum, member):
            first = groups.rows[groups.first]
            _share_out(groups, target, limit)
            tally.add(checksum[first] ^ salts[look.source_of(first)], _copies(groups.size, limit))
    finally:
        _salt(look, salts)
    plan = _Extents(look, host, target)
    shared, sharing = tally.total("pages_shared"), tally.total("pages_sharing")
    if plan.left:
        shared, sharing = plan.within_budget(shared, sharing)
    return ByExtent(
        pages=Estimate(round((np.count_nonzero(member)) * look.scale) + nzero),
        pages_shared=shared,
        pages_sharing=sharing,
        zero_pages=Estimate(nzero),
        extents=Estimate(round(plan.extents)),
        left_for_budget=Estimate(round(plan.left)),
        saved=Estimate(sharing.pages + nzero, sharing.error),
        extent_pages=plan.pages / plan.extents if plan.extents else 0.0,
    )


def _copies(size: Ints, limit: int) -> Counts:
    copies = -(-size // limit)
    return {"pages_shared": copies, "pages_sharing": size - copies}


def _share_out(groups: Groups, target: U32, limit: int) -> None:
    """Give every page its copy: the first of its group or, if one copy is not enough, one of the first few in turn."""
    copies = groups.spread(-(-groups.size // limit))
    first = groups.spread(groups.first)
    rank = np.arange(len(groups.rows)) - first
    target[groups.rows] = groups.rows[first + rank % copies]


def _salts(look: Look) -> U64:
    """A number a source: the same for all of one user, so that nothing is equal across users."""
    uids = np.array([-1 if rows.source.uid is None else rows.source.uid for rows in look.sources], np.int64)
    return (uids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)


def _salt(look: Look, salts: U64) -> None:
    """Change all checksums by who owns them; twice, and they are as before."""
    for rows, salt in zip(look.sources, salts, strict=True):
        look.checksum[rows.first : rows.end] ^= salt


def by_moving_blocks(look: Look, among: Bools, joins: Bools) -> int:
    """Pages that can be saved besides if blocks of malloc's begin with a page each (`Blocks`). `among`: these rows can
    be saved anyway. `joins`: the blocks of these sources count."""
    blocks, zero = look.blocks, np.uint64(zero_checksum())
    salts = _salts(look)
    rows = blocks.rows.astype(np.int64)
    rows = rows[(look.checksum[rows] != zero) & joins[look.source_of(rows)]]
    has_data = (blocks.moved != zero) & joins[blocks.moved_sources]
    now = look.checksum[rows] ^ salts[look.source_of(rows)]
    then = blocks.moved[has_data] ^ salts[blocks.moved_sources[has_data]]
    contents = np.unique(np.concatenate([now, then]))
    if not len(contents):
        return 0
    of_block = np.zeros(look.rows, np.bool_)
    of_block[rows] = True
    others = np.zeros(len(contents), np.int64)
    for at in range(0, look.rows, BLOCK):
        part = np.arange(at, min(at + BLOCK, look.rows))
        part = part[representative(look.flags[part]) & among[part] & ~of_block[part]]
        others += _count(contents, look.checksum[part] ^ salts[look.source_of(part)])
    saved = []
    for blocks_pages in (_count(contents, now), _count(contents, then)):
        count = others + blocks_pages
        saved.append(int(count.sum()) - int(np.count_nonzero(count)))
    return round(max(0, saved[1] - saved[0]) * look.scale)


def _count(contents: U64, checksum: U64) -> Ints:
    """How often each of these contents is among them."""
    place = np.minimum(np.searchsorted(contents, checksum), len(contents) - 1)
    return np.bincount(place[contents[place] == checksum], minlength=len(contents))


@dataclass(slots=True)
class _Extents:
    """The extents of every source, and which of them its budget of mappings has room for."""

    look: Look
    host: Host
    target: U32
    extents: float = 0
    pages: float = 0
    left: float = 0
    _dropped: list[tuple[int, int]] = field(default_factory=list)  # first row and pages of extents without room

    def __post_init__(self) -> None:
        share = 0.0 if self.look.previous is None else self._begin_share(self.look.previous)
        for rows in self.look.sources:
            budget = self.host.mappings_allowed - (rows.map_count or 0)
            if self.look.previous is None:
                self._plan(rows, budget)
            else:
                self._plan_sample(rows, share, budget)

    def _plan(self, rows: SourceRows, budget: int) -> None:
        start, length = self._of(rows)
        self.extents += len(start)
        self.pages += int(length.sum())
        if len(start):
            meets = (start[1:] == start[:-1] + length[:-1]) & ~np.isin(start[1:], self.look.starts)
            over = np.flatnonzero(~affordable(length, meets, budget))
            self.left += int(length[over].sum())
            self._dropped += zip(start[over].tolist(), length[over].tolist(), strict=True)

    def _of(self, rows: SourceRows) -> tuple[Ints, Ints]:
        """First row and pages of each extent. One is cut where a block of rows ends."""
        starts, lengths = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        breaks = self.look.starts
        for at in range(rows.first, rows.end, BLOCK):
            target = self.target[at : min(at + BLOCK, rows.end)]
            merged = target != NOBODY
            begins = merged.copy()
            begins[1:] &= ~merged[:-1] | (target[1:] != target[:-1] + np.uint32(1))
            low, high = np.searchsorted(breaks, [at, at + len(target)])
            cut = breaks[low:high].astype(np.int64) - at
            begins[cut] |= merged[cut]
            ends = ~merged
            ends[1:] &= merged[:-1]
            edges = np.flatnonzero(begins | ends)
            length = np.diff(np.append(edges, len(target)))
            starts.append(edges[begins[edges]] + at)
            lengths.append(length[begins[edges]])
        return np.concatenate(starts), np.concatenate(lengths)

    def _begin_share(self, previous: U64) -> float:
        """Of a sample: the share of merged pages that begin an extent. One goes on where the page before is equal to
        the page before the copy. Rows of a sample are no neighbours, but what was before each is known."""
        begins = pages = 0
        for at in range(0, self.look.rows, BLOCK):
            mine = np.arange(at, min(at + BLOCK, self.look.rows))
            target = self.target[mine]
            others = (target != NOBODY) & (target != mine)  # of a copy's own page nothing can be said
            mine, target = mine[others], target[others]
            begins += int(np.count_nonzero((previous[mine] != previous[target]) | (previous[mine] == 0)))
            pages += len(mine)
        return max(begins / pages, 1 / SEGMENT_PAGES) if pages else 1.0

    def _plan_sample(self, rows: SourceRows, share: float, budget: int) -> None:
        pages = float(np.count_nonzero(self.target[rows.first : rows.end] != NOBODY)) * self.look.scale
        extents = pages * share
        self.pages += pages
        self.extents += extents
        if 2 * extents > budget:  # those that save most come first, and neighbours cost less: so it is less than that
            self.left += pages * (1 - max(budget, 0) / (2 * extents))

    def within_budget(self, shared: Estimate, sharing: Estimate) -> tuple[Estimate, Estimate]:
        """Copies and further pages when the extents that there is no room for are not merged."""
        if self.look.previous is not None:
            part = 1 - self.left / self.pages
            # Those that have room are the longest, not any: so more may be merged than that part, if not all.
            shared, sharing = (
                Estimate(round(e.pages * part), e.error + round(e.pages * (1 - part))) for e in (shared, sharing)
            )
            return shared, sharing
        for start, length in self._dropped:
            self.target[start : start + length] = NOBODY
        users = np.zeros(self.look.rows, np.uint32)
        for at in range(0, len(self.target), BLOCK):
            targets = self.target[at : at + BLOCK]
            np.add.at(users, targets[targets != NOBODY], 1)
        shared_pages = int(np.count_nonzero(users >= 2))  # one page alone would save nothing
        return Estimate(shared_pages), Estimate(int(users[users >= 2].sum()) - shared_pages)
