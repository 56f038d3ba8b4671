"""Test suites of CPython and numpy: no test of theirs comes out otherwise under samepage."""

from __future__ import annotations

import importlib.util
import re

import pytest

from tests.compat.programs import FULL_RATE, Outcome, Program, Runs

RESULT = re.compile(
    r"^(test\w*) \(([\w.]+)\)(?:.*\n)*?.*?\.\.\. (?:.*\n)*?.*?\b(ok|skipped|FAIL|ERROR|expected failure)\b", re.M
)
"""How unittest says what came of one test; the test may print something before the verdict."""


def cpython(name: str, joins: int, **options: str | int) -> Program:
    return Program(
        name,
        prepare="""for how in fork spawn forkserver; do printf 'import test._test_multiprocessing as tests
tests.install_tests_in_module_dict(globals(), "%s")\\n' $how >test_multiprocessing_$how.py; done""",
        command=f"$PYTHON -m unittest -v {name}",
        joins=joins,
        timeout=1200,
        **options,  # type: ignore[arg-type]
    )


SHORT = [
    cpython("test.test_mmap", 1),
    cpython("test.test_fork1", 1),
    cpython("test.test_posix", 1),
    cpython("test.test_array", 1),
    cpython("test.test_lzma", 1),
]

LONG = [
    cpython("test.test_threading", 10),
    cpython("test.test_subprocess", 20),
    cpython("test.test_os", 5),
    cpython("test.test_io", 5),
    cpython("test.test_asyncio.test_unix_events", 1),
    cpython("test_multiprocessing_fork", 50),
    cpython("test_multiprocessing_spawn", 50),
    cpython("test_multiprocessing_forkserver", 50),
]


def verdicts(outcome: Outcome) -> dict[str, str]:
    return {f"{test} {where}": verdict for test, where, verdict in RESULT.findall(outcome.errors)}


def needs_cpythons_tests() -> None:
    if importlib.util.find_spec("test") is None or importlib.util.find_spec("test.test_mmap") is None:
        pytest.skip("this Python came without its tests (Debian: libpython3-testsuite)")


@pytest.mark.parametrize("program", SHORT, ids=lambda program: program.name)
def test_cpythons_tests_come_out_the_same(runs: Runs, program: Program):
    needs_cpythons_tests()
    outcome, report = runs.merged(program, FULL_RATE)
    bare = runs.once(program)
    assert len(verdicts(bare)) > 3, bare.errors
    assert (outcome.status, verdicts(outcome)) == (bare.status, verdicts(bare))
    assert report.joined >= program.joins, report


@pytest.mark.long
@pytest.mark.timeout(2500)
@pytest.mark.parametrize("program", LONG, ids=lambda program: program.name)
def test_no_test_of_cpythons_fails_that_passes_without_samepage(runs: Runs, program: Program):
    """These depend on time: some fail without samepage too, now and then. Whatever fails is tried without."""
    needs_cpythons_tests()
    outcome, report = runs.merged(program, FULL_RATE)
    here = verdicts(outcome)
    assert len(here) > 3, outcome.errors
    worse = {test for test, verdict in here.items() if verdict in ("FAIL", "ERROR")}
    if worse:
        bare = verdicts(runs.once(program))
        worse = {test for test in worse if bare.get(test) == "ok"}
    assert not worse, outcome.errors
    assert outcome.status in (0, 1), outcome.errors
    assert report.joined >= program.joins, report


NUMPY = Program(
    "numpy",
    # Not -rA: the summary that it makes takes time by the square of the number of tests (pytest 9).
    command="""$PYTHON -m pytest -v -p no:cacheprovider --no-header --color=no --pyargs \
        numpy._core.tests.test_multiarray \
        numpy._core.tests.test_memmap numpy._core.tests.test_mem_policy numpy._core.tests.test_mem_overlap \
        numpy._core.tests.test_indexing numpy._core.tests.test_item_selection numpy._core.tests.test_multithreading \
        -k 'not huge_vectordot'""",  # which is skipped if less than 18 GB are free
    joins=1,
    merges=True,
    timeout=1200,
)


@pytest.mark.long
@pytest.mark.timeout(5000)
def test_numpys_tests_of_arrays_come_out_the_same(runs: Runs):
    def results(outcome: Outcome) -> list[str]:
        return sorted(re.findall(r"^.*?(::.+ (?:PASSED|FAILED|ERROR|SKIPPED|XFAIL))\b", outcome.output, re.M))

    (first, second), report = runs.merged_copies(NUMPY, 2, FULL_RATE)
    bare = runs.once(NUMPY)
    assert len(results(bare)) > 10_000
    assert results(first) == results(second) == results(bare)
    assert (first.status, second.status) == (bare.status, bare.status)
    assert report.joined >= 2
    assert report.bytes_saved_peak > 0
