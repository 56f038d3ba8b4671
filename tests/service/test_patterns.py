"""What a policy's conditions are compared with is named by users, who may choose names that are made for it."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samepage.service.patterns import is_within, matches


@pytest.mark.parametrize("pattern", ["/**/a*-*-*-*.scope", "/**a**a**a**a**a**b", "/" + "*a" * 40, "**"])
def test_a_name_that_was_made_for_it_takes_no_time_to_be_compared(pattern: str) -> None:
    path = "/user.slice" + ("/" + "a" * 127 + "-" * 127) * 15
    began = time.thread_time()
    is_within(pattern, path)
    matches(pattern, path)
    assert time.thread_time() - began < 0.5


def test_a_name_is_compared_as_far_as_it_takes_and_once() -> None:
    paths = [f"/user.slice/{n}/" + "a/" * 2000 for n in range(200)]
    began = time.thread_time()
    assert not any(is_within("/system.slice/**", path) for path in paths)
    assert time.thread_time() - began < 0.05
    began = time.thread_time()
    assert not any(is_within("**/x", paths[0]) for _ in range(1000))
    assert time.thread_time() - began < 0.05


@given(st.text("ab/*?", max_size=8), st.text("ab/", max_size=12))
def test_a_pattern_stands_for_what_its_regular_expression_does(pattern: str, text: str) -> None:
    parts = {"**": ".*", "*": "[^/]*", "?": "[^/]"}
    tokens = re.split(r"(\*\*+|\*|\?)", pattern)
    expression = "".join(parts.get(part[:2]) or re.escape(part) for part in tokens)
    assert matches(pattern, text) == (bool(text) and re.fullmatch(expression, text) is not None)
    assert is_within("/x" + pattern + "y", text) == (re.fullmatch("/x" + expression + "y(/.*)?", text) is not None)
    if not pattern.endswith(("/", "*")):
        assert is_within(pattern, text) == (re.fullmatch(expression + "(/.*)?", text) is not None)
