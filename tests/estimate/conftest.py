"""Looking at real processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from samepage.estimate import predict, report
from samepage.estimate.look import look
from samepage.estimate.process import PageFlags, Process
from samepage.estimate.report import Report
from samepage.estimate.source import Source


@pytest.fixture
def page_flags() -> Iterator[PageFlags]:
    """The kernel's page flags; without them the test is skipped."""
    flags = PageFlags()
    if not flags.available:
        flags.close()
        pytest.skip("needs root, for page frame numbers and /proc/kpageflags")
    yield flags
    flags.close()


def report_of(*sources: Source, sample: float | None = None) -> Report:
    """A look at these sources, and the report of it."""
    seen = look(sources, sample=sample)
    host = predict.this_host()
    return report.build(seen, host, predict.analyse(seen, host), None, "test")


@pytest.fixture
def scan(page_flags: PageFlags) -> Callable[..., Report]:
    """The report of a look at processes, by pid, with the page flags."""
    return lambda *pids: report_of(*(Process(pid, page_flags) for pid in pids))
