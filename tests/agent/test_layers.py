"""The check of the agent's layers, which `make check` runs on the agent itself."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.agent.layers import ROOT, SOURCES, picture, upward_includes, upward_symbols

LAYERS = ["low", "high"]


def build(folder: Path, **files: str) -> list[Path]:
    """Objects named as meson names them: low_a for low/a.c."""
    made = []
    for name, text in files.items():
        source = folder / f"{name}.c"
        source.write_text(text)
        made.append(folder / f"{name}.c.o")
        subprocess.run(["gcc", "-c", str(source), "-o", str(made[-1])], check=True)
    return made


@pytest.mark.parametrize("symbol", ["int up(void) { return 1; }", "int up = 1;", "int up;", "const int up = 1;"])
def test_a_symbol_of_a_layer_above_is_found(tmp_path: Path, symbol: str) -> None:
    objects = build(tmp_path, low_a="extern int up; int *a(void) { return &up; }", high_b=symbol)
    assert list(upward_symbols(LAYERS, objects)) == ["low_a.c.o uses up of high_b.c.o"]


def test_what_a_layer_uses_of_itself_of_those_below_and_of_others_is_right(tmp_path: Path) -> None:
    objects = build(
        tmp_path,
        low_a="int a(void) { return 1; }",
        low_b="int a(void); int puts(const char *); int b(void) { return a() + puts(0); }",
        high_c="int b(void); int c(void) { return b(); }",
        high_d="int c(void); static int up(void) { return c(); } int d(void) { return up(); }",
    )
    assert list(upward_symbols(LAYERS, objects)) == []


@pytest.mark.parametrize("header", ["high/b.h", "b.h", "../high/b.h"])
def test_an_include_of_a_layer_above_or_of_no_layer_is_found(tmp_path: Path, header: str) -> None:
    (tmp_path / "low").mkdir()
    (tmp_path / "low" / "a.h").write_text(f'#include <stdio.h>\n#include "low/c.h"\n#include "{header}"\n')
    assert list(upward_includes(LAYERS, tmp_path)) == [f"low/a.h includes {header}"]


def test_the_picture_says_where_each_source_of_the_agent_is() -> None:
    layers = picture((ROOT / "docs" / "architecture.md").read_text())
    assert {path.relative_to(SOURCES).parts[0] for path in SOURCES.rglob("*.[ch]")} == {*layers}
    assert list(upward_includes(layers, SOURCES)) == []
