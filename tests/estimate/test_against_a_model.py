"""The arrays give what counting one page after the other gives."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samepage.estimate import predict
from samepage.estimate.groups import PageClass
from samepage.estimate.look import Look, look
from samepage.estimate.source import PageFlag
from samepage.ksmd.budget import affordable
from samepage.ksmd.stable import SEGMENT_PAGES
from tests.estimate.fake import FakeSource, Page

HOST = predict.Host("6.18.0", 3, False, 100, 20, 65530)
"""With a max_page_sharing that small numbers of pages come to."""


@st.composite
def sources(draw: st.DrawFn) -> list[FakeSource]:
    """Some processes of two users: pages of few contents, frames that several pages share, holes between pages."""
    counts = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    total = sum(counts)
    # A frame has one content, and is merged by KSM or not, as a whole.
    contents = draw(st.lists(st.integers(0, 4), min_size=total, max_size=total))
    ksm = draw(st.lists(st.booleans(), min_size=total, max_size=total))
    huge = draw(st.lists(st.booleans(), min_size=total, max_size=total))
    frames = [draw(st.integers(0, total - 1)) if draw(st.booleans()) else total + i for i in range(total)]
    outside = draw(st.lists(st.sampled_from([0, 0, 0, 1]), min_size=2 * total, max_size=2 * total))
    met = Counter(frames)
    pages = [
        Page(
            contents[frame % total],
            frame,
            met[frame] + outside[frame],
            ksm[frame % total] and draw(st.integers(0, 3)) == 0 and met[frame] > 1,
            huge[i],
        )
        for i, frame in enumerate(frames)
    ]
    merged = {page.frame for page in pages if page.ksm}
    pages = [replace(page, ksm=page.frame in merged) for page in pages]
    out: list[FakeSource] = []
    for pid, count in enumerate(counts):
        vpn = 0
        placed: list[tuple[int, Page]] = []
        for page in pages[:count]:
            vpn += draw(st.sampled_from([1, 1, 1, 2]))
            placed.append((vpn, page))
        pages = pages[count:]
        out.append(FakeSource(placed, pid=pid + 1, uid=pid % 2, batch=draw(st.integers(1, 5))))
    return out


@dataclass(frozen=True)
class Seen:
    """A page as it is met: its number, whose it is, where, and whether it is the first of its frame."""

    row: int
    source: int
    vpn: int
    page: Page
    first: bool
    sole: bool

    @property
    def own(self) -> bool:
        return self.first and self.sole and not self.page.ksm


def walk(fakes: list[FakeSource]) -> list[Seen]:
    met = Counter(page.frame for fake in fakes for _, page in fake.pages)
    known: set[int] = set()
    out: list[Seen] = []
    for number, fake in enumerate(fakes):
        for vpn, page in fake.pages:
            sole = met[page.frame] >= page.mapcount
            out.append(Seen(len(out), number, vpn, page, page.frame not in known, sole))
            known.add(page.frame)
    return out


def by_content(seen: list[Seen]) -> dict[int, list[Seen]]:
    groups = defaultdict(list)
    for one in seen:
        groups[one.page.content].append(one)
    return groups


def nodes_and_rest(pages: int) -> tuple[int, int]:
    """As KSM fills them: one after the other, and the last needs two."""
    nodes = 0
    while pages >= 2:
        nodes, pages = nodes + 1, max(0, pages - HOST.max_page_sharing)
    return nodes, pages


def expected_classes(seen: list[Seen]) -> list[int]:
    out: list[int] = []
    groups = by_content(seen)
    for one in seen:
        group = groups[one.page.content]
        frames = {other.page.frame for other in group}
        whose = {other.source for other in group if other.first}
        if not one.own:
            out.append(PageClass.SHARED)
        elif one.page.content == 0:
            out.append(PageClass.ZERO)
        elif len(frames) < 2:
            out.append(PageClass.UNIQUE)
        else:
            out.append(PageClass.BETWEEN if len(whose) > 1 else PageClass.INSIDE)
    return out


def expected_ksm(seen: list[Seen]) -> tuple[int, int, int]:
    """pages_shared, pages_sharing, and pages saved."""
    shared = sharing = saved = 0
    for content, group in by_content(seen).items():
        merged = {one.page.frame for one in group if one.page.ksm}
        pages = group
        if content == 0:
            # A page of zeros in a huge page is gone when that is split.
            saved += sum(one.own for one in group if one.page.huge) if len(group) > 1 else 0
            if len(group) > 1:
                pages = [one for one in group if not one.page.huge]
            nodes, rest = nodes_and_rest(len(pages))
            shared, sharing = shared + nodes, sharing + len(pages) - nodes - rest
            saved += max(0, sum(one.own for one in pages) - nodes - rest)
            continue
        if len({one.page.frame for one in group}) < 2 and not merged:
            continue
        nodes, rest = nodes_and_rest(len(pages))
        if len(pages) == 1:  # KSM's already
            nodes, rest = 1, 0
        shared, sharing = shared + nodes, sharing + len(pages) - nodes - rest
        if len(pages) > 1:
            saved += max(0, sum(one.own for one in pages) - max(0, nodes - len(merged)) - rest)
    return shared, sharing, saved


def looked_at(fakes: list[FakeSource]) -> Look:
    return look(fakes)


@settings(deadline=None, max_examples=25)
@given(sources())
def test_classes_are_those_of_pages_compared_one_by_one(fakes: list[FakeSource]) -> None:
    analysis = predict.analyse(looked_at(fakes), HOST)
    assert analysis.classes.tolist() == expected_classes(walk(fakes))


@settings(deadline=None, max_examples=25)
@given(sources())
def test_ksm_is_predicted_as_if_page_after_page_were_put_into_its_trees(fakes: list[FakeSource]) -> None:
    # Zeros that KSM merged before are not split any more: leave that corner out.
    fakes = [
        replace(f, pages=[(v, replace(p, ksm=p.ksm and p.content != 0, huge=p.huge and not p.ksm)) for v, p in f.pages])
        for f in fakes
    ]
    by_page = predict.analyse(looked_at(fakes), HOST).by_page
    predicted = (by_page.pages_shared.pages, by_page.pages_sharing.pages, by_page.saved.pages)
    assert predicted == expected_ksm(walk(fakes))


@settings(deadline=None, max_examples=25)
@given(sources())
def test_what_is_saved_inside_and_between_is_never_more_than_what_can_be_freed(fakes: list[FakeSource]) -> None:
    analysis = predict.analyse(looked_at(fakes), HOST)
    mergeable = np.count_nonzero(np.isin(analysis.classes, [PageClass.ZERO, PageClass.INSIDE, PageClass.BETWEEN]))
    assert 0 <= analysis.by_page.saved_inside.pages <= analysis.by_page.saved.pages <= mergeable


@settings(deadline=None, max_examples=25)
@given(sources())
def test_pairs_are_the_contents_that_both_have(fakes: list[FakeSource]) -> None:
    analysis = predict.analyse(looked_at(fakes), HOST)
    have: dict[int, set[int]] = defaultdict(set)
    for one in walk(fakes):
        if one.own:
            have[one.source].add(one.page.content)
    for a in range(len(fakes)):
        for b in range(len(fakes)):
            if a != b:
                assert analysis.matrix[a, b] == len(have[a] & have[b])


def expected_extents(fakes: list[FakeSource], budget: int) -> tuple[int, int, int, int]:
    """Copies, further pages, extents, and pages left for want of mappings."""
    seen = [one for one in walk(fakes) if one.own and one.page.content]
    groups: dict[tuple[int | None, int], list[Seen]] = defaultdict(list)
    for one in seen:
        groups[fakes[one.source].uid, one.page.content].append(one)
    target: dict[int, int] = {}
    for group in groups.values():
        copies = -(-len(group) // HOST.max_page_sharing)
        if len(group) > 1:
            target |= {one.row: group[i % copies].row for i, one in enumerate(group)}
    extents: list[list[Seen]] = []
    for one in seen:
        if one.row not in target:
            continue
        last = extents[-1][-1] if extents else None
        if (
            last
            and last.source == one.source
            and last.vpn + 1 == one.vpn
            and last.row + 1 == one.row
            and target[last.row] + 1 == target[one.row]
        ):
            extents[-1].append(one)
        else:
            extents.append([one])
    left = 0
    for number in range(len(fakes)):
        mine = [e for e in extents if e[0].source == number]
        if not mine:
            continue
        meets = [a[-1].vpn + 1 == b[0].vpn and a[-1].row + 1 == b[0].row for a, b in pairwise(mine)]
        keep = affordable(np.array([len(e) for e in mine]), np.array(meets, np.bool_), budget)
        for extent, kept in zip(mine, keep.tolist(), strict=True):
            if not kept:
                left += len(extent)
                for one in extent:
                    del target[one.row]
    users = Counter(target.values())
    copies = sum(count >= 2 for count in users.values())
    return copies, sum(count for count in users.values() if count >= 2) - copies, len(extents), left


@settings(deadline=None, max_examples=25)
@given(sources(), st.sampled_from([2, 4, 65530]))
def test_extents_are_runs_of_pages_whose_neighbours_are_equal_to_neighbours(
    fakes: list[FakeSource], spare: int
) -> None:
    for fake in fakes:
        fake.map_count = HOST.mappings_allowed - spare
    seen = looked_at(fakes)
    plan = predict.by_extent(seen, HOST, HOST.max_page_sharing)
    got = (plan.pages_shared.pages, plan.pages_sharing.pages, plan.extents.pages, plan.left_for_budget.pages)
    assert got == expected_extents(fakes, spare)


@settings(deadline=None, max_examples=25)
@given(sources())
def test_comparing_leaves_the_checksums_as_they_were(fakes: list[FakeSource]) -> None:
    seen = looked_at(fakes)
    before = seen.checksum.copy()
    predict.by_extent(seen, HOST, HOST.max_page_sharing)
    assert (seen.checksum == before).all()


@settings(deadline=None, max_examples=25)
@given(sources())
def test_a_frame_is_read_once_however_often_it_is_mapped(fakes: list[FakeSource]) -> None:
    seen = looked_at(fakes)
    assert seen.pages_read == len({page.frame for fake in fakes for _, page in fake.pages})
    rows = walk(fakes)
    by_sum = {(int(s), one.page.content) for s, one in zip(seen.checksum, rows, strict=True)}
    assert len({s for s, _ in by_sum}) == len({c for _, c in by_sum}) == len(by_sum)
    assert [bool(f & PageFlag.FRAME) for f in seen.flags] == [one.first for one in rows]
    assert [bool(f & PageFlag.OUTSIDE) for f in seen.flags] == [not one.sole for one in rows]


@pytest.mark.parametrize(("spare", "fits"), [(2, False), (3, True)])
def test_an_extent_costs_two_mappings_and_one_more_for_each_segment_it_goes_on_in(spare: int, fits: bool) -> None:
    pages = [(vpn, Page(vpn, vpn)) for vpn in range(1, SEGMENT_PAGES + 2)]
    fakes = [FakeSource(pages, pid=pid, batch=1000, map_count=HOST.mappings_allowed - spare) for pid in (1, 2)]
    fakes[1].pages = [(vpn, Page(vpn, vpn + 10_000)) for vpn, _ in pages]
    seen = looked_at(fakes)
    plan = predict.by_extent(seen, HOST, 256)
    assert plan.extents.pages == 2
    assert plan.left_for_budget.pages == (0 if fits else 2 * len(pages))
    assert plan.saved.pages == (len(pages) if fits else 0)
