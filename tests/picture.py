"""The picture of the layers in docs/architecture.md is what pyproject.toml has import-linter check."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> int:
    """1, and both, if they differ."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contract = project["tool"]["importlinter"]["contracts"][0]
    layers = [[name.strip() for name in layer.split("|")] for layer in contract["layers"]]
    text = (ROOT / "docs" / "architecture.md").read_text()
    lines = text.partition("<!-- layers of the package -->")[2].split("```")[1].strip().splitlines()
    shown = [line.split()[: len(layer)] for line, layer in zip(lines, layers, strict=False)]
    if shown != layers or len(lines) != len(layers):
        print(f"docs/architecture.md shows {shown}, pyproject.toml says {layers}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
