"""Memory that is said to be some process's: pages in a memfd, with whatever frames and flags a test wants."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from samepage.estimate.source import Batch, Kind, Mapping, Opened, PageFlag
from samepage.memory import PAGE_SIZE


@dataclass(frozen=True)
class Page:
    """A page: its content (0: zeros), its frame, and how often that is mapped, also by others than are looked at."""

    content: int
    frame: int
    mapcount: int = 1
    ksm: bool = False
    huge: bool = False
    taken: bool = False


def page_bytes(content: int) -> bytes:
    """4096 bytes that say `content`."""
    return content.to_bytes(8, "little") * (PAGE_SIZE // 8)


@dataclass
class FakeSource:
    """A process with these pages, each at the page number beside it; `batch` of them at a time."""

    pages: Sequence[tuple[int, Page]]
    pid: int | None = 1
    uid: int | None = 0
    batch: int = 3
    mappings: list[Mapping] = field(default_factory=lambda: [Mapping(0, 1 << 40, Kind.HEAP, "[heap]")])
    map_count: int = 10
    lives: bool = True
    name: str = "fake"

    def alive(self) -> bool:
        return self.lives

    def expected_pages(self) -> int:
        return len(self.pages)

    def open(self) -> Opened:
        fd = os.memfd_create("fake")
        for vpn, page in self.pages:
            os.pwrite(fd, page_bytes(page.content), vpn * PAGE_SIZE)
        return Opened(fd, self.mappings, self._batches(), map_count=self.map_count)

    def _batches(self) -> Iterator[Batch]:
        for at in range(0, len(self.pages), self.batch):
            part = self.pages[at : at + self.batch]
            flags = np.zeros(len(part), np.uint8)
            for i, (_, page) in enumerate(part):
                shared = page.mapcount > 1
                flags[i] |= PageFlag.SHARED if shared else np.uint8(0)
                flags[i] |= PageFlag.KSM if page.ksm else np.uint8(0)
                flags[i] |= PageFlag.HUGE if page.huge else np.uint8(0)
                flags[i] |= PageFlag.TAKEN if page.taken else np.uint8(0)
                flags[i] |= PageFlag.FRAME if not shared and not page.ksm else np.uint8(0)
            known = [page for _, page in part if page.mapcount > 1 or page.ksm]
            yield Batch(
                np.array([vpn for vpn, _ in part], np.int64),
                flags,
                frames=np.array([page.frame for page in known], np.uint64),
                mapcounts=np.array([page.mapcount for page in known], np.uint64),
            )
