"""Where the C libraries of the package are."""

from __future__ import annotations

from pathlib import Path


def installed(name: str) -> Path:
    """Where a library of that name is, existing or not: beside the package.

    An editable install leaves it in its build folder; only importlib knows where.
    """
    beside = Path(__file__).parent / name
    if beside.exists():
        return beside
    from importlib import resources  # slow to load, and rarely needed

    return Path(str(resources.files("samepage") / name))
