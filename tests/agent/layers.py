"""The layers of the agent: no symbol is used, and no header included, from a folder above.

    python -m tests.agent.layers BUILD

BUILD is a build directory of meson's. Each arrow that points up is a line on stdout, and the exit status is 1.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src" / "samepage" / "agent"
DEFINED = "TDBRVWC"
"""What `nm` says of a symbol that other objects see."""


def picture(text: str) -> list[str]:
    """The layers, lowest first, as the picture in docs/architecture.md has them."""
    box = text.partition("<!-- layers of the agent -->")[2].split("```")[1]
    return [line.split()[0] for line in box.splitlines() if line.strip()][::-1]


def compiled(build: Path) -> list[Path]:
    """The objects of the agent, but for those that an earlier build left behind."""
    commands = json.loads((build / "compile_commands.json").read_text())
    return [build / one["output"] for one in commands if "/libsamepage.so.p/" in one["output"]]


def layer(name: str) -> str:
    """Of an object: `libsamepage.so.p/pages_scan.c.o` is pages/scan.c."""
    return name.partition("_")[0]


def symbols(objects: list[Path]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Which object defines what, and (object, what it uses) of all."""
    defined: dict[str, str] = {}
    used: list[tuple[str, str]] = []
    for path in objects:
        listed = subprocess.run(["nm", str(path)], capture_output=True, text=True, check=True).stdout
        for *_, kind, symbol in (line.split() for line in listed.splitlines()):
            if kind == "U":
                used.append((path.name, symbol))
            elif kind in DEFINED:
                defined[symbol] = path.name
    return defined, used


def upward_symbols(layers: list[str], objects: list[Path]) -> Iterator[str]:
    height = {name: i for i, name in enumerate(layers)}
    defined, used = symbols(objects)
    for user, symbol in used:
        owner = defined.get(symbol, user)
        if height[layer(owner)] > height[layer(user)]:
            yield f"{user} uses {symbol} of {owner}"


def upward_includes(layers: list[str], sources: Path) -> Iterator[str]:
    """An include that names no layer is wrong, too: it may be of any."""
    height = {name: i for i, name in enumerate(layers)}
    for path in sorted(sources.rglob("*.[ch]")):
        relative = path.relative_to(sources)
        for header in re.findall(r'^#\s*include "([^"]*)"', path.read_text(), re.MULTILINE):
            if height.get(header.split("/")[0], len(layers)) > height.get(relative.parts[0], -1):
                yield f"{relative} includes {header}"


def main(build: str) -> int:
    layers = picture((ROOT / "docs" / "architecture.md").read_text())
    folders = {path.relative_to(SOURCES).parts[0] for path in SOURCES.rglob("*.[ch]")}
    wrong = [f"{name} is no layer" for name in sorted(folders ^ {*layers})]
    if not wrong:
        objects = compiled(Path(build))
        wrong = [*upward_symbols(layers, objects), *upward_includes(layers, SOURCES)]
    for line in wrong:
        print(line)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
