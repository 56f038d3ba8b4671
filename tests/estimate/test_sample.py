"""A sample says how far off it may be, and is no further off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from samepage.estimate import predict
from samepage.estimate.look import Look, SourceRows, look
from samepage.estimate.sample import Sampler
from samepage.estimate.source import PageFlag
from samepage.memory import U8, U64
from tests.estimate.fake import FakeSource, Page

HOST = predict.Host("6.18.0", 256, False, 100, 20, 1 << 20)

PAGES = 20_000

Memory = Callable[[np.random.Generator], U64]


def contents(rng: np.random.Generator, sizes: list[int]) -> U64:
    """Checksums of groups of these sizes, mixed up, and unique pages to make up the number."""
    sums = rng.integers(1, 1 << 63, len(sizes), np.uint64) * np.uint64(2)
    unique = rng.integers(1, 1 << 63, max(0, PAGES - sum(sizes)), np.uint64) * np.uint64(2) + np.uint64(1)
    return rng.permutation(np.concatenate([np.repeat(sums, sizes), unique]))


MEMORIES: dict[str, Memory] = {
    "pairs": lambda rng: contents(rng, [2] * 5_000),
    "few pairs": lambda rng: contents(rng, [2] * 40),
    "nothing equal": lambda rng: contents(rng, []),
    "everything equal": lambda rng: contents(rng, [PAGES]),
    "one content fills a third": lambda rng: contents(rng, [PAGES // 3] + [2] * 2_000),
    "some that are frequent": lambda rng: contents(rng, [400] * 15 + [3] * 1_500),
    "just not frequent": lambda rng: contents(rng, [100] * 80),
    "of all sizes": lambda rng: contents(rng, [int(1.5 + 40 / (1 + i / 30)) for i in range(4_000)]),
}


def both(sums: U64, share: float) -> tuple[Look, Look]:
    """A look at pages with these checksums, and the sample of it."""
    flags = np.full(len(sums), PageFlag.FRAME, np.uint8)
    sampler = Sampler(share)
    kept = sampler.keep(sums, flags)
    whole, sample = sums.copy(), sums[kept]
    previous = np.concatenate([[np.uint64(0)], sums[:-1]])[kept]
    return (
        _look(whole, flags, 1.0, None, None),
        _look(sample, flags[kept], 1 / share, previous, sampler.every),
    )


def _look(sums: U64, flags: U8, scale: float, previous: U64 | None, every: U64 | None) -> Look:
    rows = SourceRows(FakeSource([]), 0, len(sums), npages=round(len(sums) * scale), map_count=10)
    starts = np.zeros(1, np.uint32) if previous is None else np.arange(len(sums), dtype=np.uint32)
    return Look([rows], sums, flags, starts, None, True, scale, previous, every, [], 1.0, 1.0, len(sums))


def covered(memory: str, share: float, seeds: int) -> dict[str, int]:
    """For how many of so many samples the full answer lay within the error that was told."""
    within = dict.fromkeys(("saved", "pages_shared", "pages_sharing", "by extent"), 0)
    for seed in range(seeds):
        whole, sample = both(MEMORIES[memory](np.random.default_rng([seed, round(share * 100)])), share)
        full, guess = (predict.analyse(look, HOST).by_page for look in (whole, sample))
        pairs = {name: (getattr(full, name), getattr(guess, name)) for name in list(within)[:3]}
        extents = (predict.by_extent(look, HOST, 256) for look in (whole, sample))
        pairs["by extent"] = (next(extents).saved, next(extents).saved)
        for name, (truth, estimate) in pairs.items():
            within[name] += abs(truth.pages - estimate.pages) <= estimate.error
    return within


@pytest.mark.parametrize("memory", MEMORIES)
def test_the_full_answer_lies_within_the_error_that_is_told(memory: str) -> None:
    assert min(covered(memory, 0.1, seeds=5).values()) == 5


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("memory", MEMORIES)
def test_in_97_of_100_samples_at_least(memory: str, share: float) -> None:
    assert min(covered(memory, share, seeds=100).values()) >= 97


def test_the_error_that_is_told_is_worth_telling() -> None:
    _, sample = both(MEMORIES["pairs"](np.random.default_rng(1)), 0.1)
    saved = predict.analyse(sample, HOST).by_page.saved
    assert 0 < saved.error < saved.pages / 4


def test_a_frequent_content_that_is_not_in_the_sample_is_told() -> None:
    for seed in range(20):
        _, sample = both(MEMORIES["one content fills a third"](np.random.default_rng(seed)), 0.1)
        analysis = predict.analyse(sample, HOST)
        seen = np.count_nonzero(analysis.classes == 2) * sample.scale > PAGES // 2
        assert seen or abs(analysis.unseen - PAGES // 3) < PAGES // 8


def test_where_mappings_do_not_suffice_the_error_says_how_much_more_it_may_be() -> None:
    few = replace(HOST, max_map_count=8_000)
    whole, sample = both(MEMORIES["pairs"](np.random.default_rng(1)), 0.1)
    full, guess = (predict.by_extent(look, few, 256) for look in (whole, sample))
    assert full.left_for_budget.pages > 0
    assert guess.left_for_budget.pages > 0
    assert abs(full.saved.pages - guess.saved.pages) <= guess.saved.error


def test_all_pages_are_a_sample_without_an_error() -> None:
    whole, _ = both(MEMORIES["of all sizes"](np.random.default_rng(1)), 0.1)
    assert predict.analyse(whole, HOST).by_page.saved.error == 0


def test_a_sample_of_processes_keeps_equal_pages_together_and_counts_zeros_exactly() -> None:
    pages = [(vpn, Page(0 if vpn % 4 == 0 else vpn // 2, vpn)) for vpn in range(1, 4001)]
    fakes = [FakeSource(pages, pid=pid, batch=700) for pid in (1, 2)]
    fakes[1].pages = [(vpn, Page(page.content, page.frame + 10_000)) for vpn, page in pages]
    sample = look(fakes, sample=0.25)
    assert [rows.npages for rows in sample.sources] == [4000, 4000]
    first, second = (set(sample.checksum[rows.first : rows.end].tolist()) for rows in sample.sources)
    assert first == second
    analysis = predict.analyse(sample, HOST)
    zeros = np.count_nonzero(analysis.classes == 1) * sample.scale
    assert abs(zeros - 2000) <= 4
    assert abs(sample.rows / 2000 - 1) < 0.2
