"""How large everything is that is measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """How large everything is: in MiB a process, in seconds, in processes."""

    same: int = 512
    eight: int = 256
    scattered: int = 256
    runs: int = 256
    models: int = 8
    nothing: int = 256
    rounds: int = 6
    window: float = 0.25
    """Seconds of the application's throughput in one look,"""
    turns: int = 8
    """of so many;"""
    nothing_window: float = 5.0
    """and where nothing is in common, and passes are seconds apart."""
    unchanged: tuple[int, ...] = (1024, 4096, 8192)
    passes: int = 5
    throughput: int = 512
    stall: int = 256
    merging: float = 1.5
    """Seconds of merging during which stalls and holes are recorded, at least."""
    served: int = 128
    """Of a server whose answers are timed."""
    copy: int = 64
    copies: tuple[int, ...] = (2, 8, 32, 128, 400)
    """So many processes with the same `copy`;"""
    large: tuple[int, ...] = (1024, 4096, 8192)
    """and two, with so much."""
    areas: tuple[int, ...] = (1_000, 10_000, 100_000, 500_000)
    """So many in each of two processes."""
    extents: int = 28_000
    """Of a process that forks so many"""
    children: int = 200
    staying: tuple[int, ...] = (2, 100, 400)
    """Beside so many, others come and go for"""
    coming_seconds: float = 8.0
    mixed: int = 512
    mixed_seconds: float = 60.0
    paced: int = 2048
    """The larger of two sizes; the other is `same`."""
    guest: int = 128
    guest_seconds: int = 12
    defaults_limit: float = 60.0
    """Seconds that ksmd at its defaults is given."""
    limit: float = 60.0


FULL = Sizes()
QUICK = Sizes(
    same=128,
    eight=32,
    scattered=64,
    runs=64,
    models=3,
    nothing=64,
    rounds=3,
    turns=3,
    nothing_window=0.4,
    unchanged=(256, 1024),
    passes=2,
    throughput=128,
    stall=128,
    merging=0.5,
    served=64,
    copy=8,
    copies=(2, 8),
    large=(64, 128),
    areas=(1_000, 5_000),
    extents=1_000,
    children=20,
    staying=(2, 10),
    coming_seconds=3.0,
    mixed=64,
    mixed_seconds=5.0,
    paced=256,
    guest=32,
    guest_seconds=4,
    defaults_limit=15.0,
)
