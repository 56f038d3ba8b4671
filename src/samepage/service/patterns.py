"""Patterns of the policy: `*` and `?` stand for anything but a slash, `**` for anything.

What they are compared with is chosen by users, who make cgroups as they like. So it takes a time that is linear in the
length of the text, as no regular expression with several stars does: `**/a*-*-*` would take minutes for a name that was
made for that.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import dataclass

LENGTH_MAX = 4096
"""Characters of a pattern: no cgroup has a longer path."""

_TOKEN = re.compile(r"\*+|.", re.DOTALL)


@dataclass(frozen=True, slots=True)
class _Pattern:
    """Numbers whose bit n is about token n of the pattern."""

    literals: dict[str, int]
    one: int
    """`?`"""
    some: int
    """`*`"""
    any: int
    """`**`"""
    end: int

    def past_stars(self, reached: int) -> int:
        """A star may stand for nothing. No two are neighbours."""
        return reached | (reached & (self.some | self.any)) << 1

    def step(self, reached: int, c: str) -> int:
        """`reached`: bit n is set if the tokens before n can stand for what came before."""
        inside = -1 if c != "/" else 0
        stay = reached & (self.any | self.some & inside)
        go = reached & (self.literals.get(c, 0) | self.one & inside)
        return self.past_stars(stay | go << 1)


@functools.lru_cache(1024)
def _compiled(pattern: str) -> _Pattern:
    bits: Counter[str] = Counter()
    tokens = _TOKEN.findall(pattern)
    for n, token in enumerate(tokens):
        bits["**" if token.startswith("**") else token] |= 1 << n
    literals = {c: value for c, value in bits.items() if c not in ("*", "**", "?")}
    return _Pattern(literals, bits["?"], bits["*"], bits["**"], 1 << len(tokens))


@functools.lru_cache(4096)  # processes of one cgroup are looked at again and again
def matches(pattern: str, text: str) -> bool:
    """Whether it stands for all of a text, which is not empty."""
    known = _compiled(pattern)
    reached = known.past_stars(1)
    for c in text:
        reached = known.step(reached, c)
        if not reached:
            return False
    return bool(text) and bool(reached & known.end)


@functools.lru_cache(4096)
def is_within(pattern: str, path: str) -> bool:
    """Whether it stands for this path or one above it."""
    known = _compiled(pattern.rstrip("/"))
    reached = known.past_stars(1)
    for c in path:
        if c == "/" and reached & known.end:
            return True
        reached = known.step(reached, c)
        if not reached:
            return False
    return bool(reached & known.end)
