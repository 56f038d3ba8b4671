"""Same-page merging in user space: equal memory pages of running processes share one copy, copy-on-write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samepage.region import Region, UnmergeError, attach, register, stats

    __version__: str

__all__ = ["Region", "UnmergeError", "__version__", "attach", "register", "stats"]


def __getattr__(name: str) -> Any:
    # Loaded at first use, so that `samepage run` need not wait for what only a program that merges needs.
    if name == "__version__":
        from importlib.metadata import version

        return version("samepage")
    if name in __all__:
        from samepage import region

        return getattr(region, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
