"""What stayed the same between two looks."""

from __future__ import annotations

import random
import threading
import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from samepage.estimate import predict, report, watch
from samepage.estimate.look import look
from samepage.estimate.process import Process
from tests.estimate.fake import FakeSource, Page
from tests.estimate.subject import Subject

PLACES = st.dictionaries(st.integers(1, 30), st.integers(0, 5), max_size=20)
"""Contents, by page number."""


def placed(places: dict[int, int]) -> list[tuple[int, Page]]:
    return [(vpn, Page(content, vpn)) for vpn, content in sorted(places.items())]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(PLACES, min_size=3, max_size=3), min_size=1, max_size=3), st.integers(1, 7))
def test_a_page_is_unchanged_when_it_was_at_its_place_with_its_content_in_every_look(
    processes: list[list[dict[int, int]]], batch: int
) -> None:
    fakes = [FakeSource([], pid=i + 1, batch=batch) for i in range(len(processes))]
    latest, same = None, None
    for n in range(3):
        for fake, looks in zip(fakes, processes, strict=True):
            fake.pages = placed(looks[n])
        now = look(fakes, keep_vpns=True)
        if latest is not None:
            same = watch.unchanged(latest, now, same)
        latest = now
    expected = [
        all(looks[n].get(vpn) == content for n in range(2))
        for looks in processes
        for vpn, content in sorted(looks[2].items())
    ]
    assert same is not None
    assert same.tolist() == expected


def test_what_changes_is_no_stable_saving() -> None:
    """Half of the equal pages of a process change all the time."""
    with Subject() as one:
        one.region(400)
        one.fill(0, [1, 2] * 200)
        source = Process(one.pid)
        first = look([source], keep_vpns=True)
        one.fill(0, [7, 8] * 100)
        last = look([source], keep_vpns=True)
        same = watch.unchanged(first, last, None)
    host = predict.this_host()
    analysis = predict.analyse(last, host)
    watched = report.watched(last, host, analysis, same, looks=2, seconds=1.0)
    assert watched.duplicates >= 400
    assert 200 <= watched.duplicates_unchanged <= watched.duplicates - 200
    stable = analysis.by_page.saved.pages * 4096 - watched.by_page_saved_bytes
    assert stable >= 190 * 4096


def test_a_process_that_writes_meanwhile_is_looked_at_all_the_same() -> None:
    with Subject() as one:
        one.region(2000)
        one.fill(0, list(range(1, 2001)))
        stop = time.monotonic() + 1.0
        writer = threading.Thread(target=lambda: write_until(one, stop))
        writer.start()
        source = Process(one.pid)
        seen = [look([source], keep_vpns=True) for _ in range(3)]
        writer.join()
    assert all(s.problems == [] for s in seen)
    assert np.count_nonzero(watch.unchanged(seen[0], seen[2], None)) > 1000


def write_until(one: Subject, stop: float) -> None:
    rng = random.Random(1)
    while time.monotonic() < stop:
        one.fill(rng.randrange(100), [rng.randrange(1 << 60)])
