"""Stable nodes: the pages of sealed segments, and how many use them.

A *stable node* is one page of a segment. The nodes of a segment are numbered contiguously, so that runs of
pages stay runs of nodes. A node weighs nine bytes: the checksum of its content, and its sharers; or ten, once some node
of its domain has more sharers than fit into one.

Some segments are *adopted*: an earlier service made them, processes map them, nobody can hand them out any
more. They are counted and can be broken, but nothing is ever merged with them. So it is with those that were *retired*
when descriptors became scarce: they have no handle any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from samepage.arrays import Bools, Ints
from samepage.ksmd.index import ChecksumIndex
from samepage.ksmd.rmap import Columns
from samepage.memory import U32, U64, Segment

SEGMENT_PAGES = 2048
"""Most pages in a segment (8 MiB): a segment is freed as a whole or not at all, so they are kept small."""

SHARERS_MAX = (1 << 16) - 1
"""The sharers of a node are u16 at most. `max_page_sharing` stays far below; only forks come near."""

ADOPTED_NODES_MAX = 1 << 21
"""Nodes a domain keeps for adopted segments (20 MiB): a lying process must not fill the service's memory."""


@dataclass(slots=True, eq=False)
class StableSegment:
    """One segment. `live` of its nodes have sharers, `sharers` in all; `size` is how many pages it is known to
    have (for an adopted one: up to the last page seen). `rows` nodes from `base` on are its own."""

    base: int
    rows: int
    size: int
    ino: int
    handle: Segment | None
    born: int
    adopted: bool = False
    live: int = 0
    sharers: int = 0

    @property
    def dead(self) -> int:
        """Pages that nobody registered maps: memory held for nothing."""
        return self.size - self.live


class StableTree:
    """The stable nodes of one domain, their segments, and the index over those that can be merged with."""

    def __init__(self) -> None:
        self._nodes = Columns(np.uint64, np.uint8, rows=1 << 13)
        self.index = ChecksumIndex(lambda: self.checksum)
        self.segments: list[StableSegment] = []  # ascending by base
        self._bases: Ints = np.empty(0, np.int64)
        self._by_ino: dict[int, StableSegment] = {}
        self._adopted_rows = 0
        self.pages_shared = 0
        self.sharers_total = 0
        self.dead_nodes = 0
        self.chains = 0
        self.dups = 0

    @property
    def checksum(self) -> U64:
        """u64 a node; 0 in adopted segments, where it is not known."""
        return self._nodes.columns[0]

    @property
    def sharers(self) -> npt.NDArray[np.unsignedinteger[Any]]:
        """u8 or u16 a node: how many registered pages map it."""
        return self._nodes.columns[1]

    def nbytes(self) -> int:
        """Bytes of memory all this takes."""
        return self._nodes.resident() + self.index.nbytes() + self._bases.nbytes + 256 * len(self.segments)

    def release(self) -> None:
        """Close every segment and give all memory back. Not to be used any more."""
        for segment in self.segments:
            if segment.handle is not None:
                segment.handle.close()
        self.segments = []
        self._nodes.release()

    # -- segments ---------------------------------------------------------------------------------------

    def add(self, handle: Segment, checksums: U64, born: int) -> StableSegment:
        """A new segment. Its nodes can be found only once `publish` was called for them."""
        segment = self._register(handle.ino, handle.npages, handle, born)
        segment.size = handle.npages
        self.dead_nodes += segment.size
        self.checksum[segment.base : segment.base + segment.rows] = checksums
        return segment

    def _register(self, ino: int, rows: int, handle: Segment | None, born: int) -> StableSegment:
        base = self._nodes.allocate(rows)
        segment = StableSegment(base, rows, 0, ino, handle, born)
        at = int(np.searchsorted(self._bases, base))
        self.segments.insert(at, segment)
        self._bases = np.insert(self._bases, at, base)
        self._by_ino[ino] = segment
        return segment

    def found(self, ino: int, offset: int, npages: int, born: int) -> StableSegment | None:
        """The segment of that inode, adopted if it is not known; None if it cannot be: then leave the pages alone."""
        segment = self._by_ino.get(ino)
        end = offset + npages
        if segment is None:
            if end > SEGMENT_PAGES or self._adopted_rows + SEGMENT_PAGES > ADOPTED_NODES_MAX:
                return None
            self._adopted_rows += SEGMENT_PAGES
            segment = self._register(ino, SEGMENT_PAGES, None, born)
            segment.adopted = True
        if end > segment.rows:
            return None
        if segment.adopted and end > segment.size:
            self.dead_nodes += end - segment.size
            segment.size = end
        return segment

    def close(self, segment: StableSegment) -> None:
        """Close a segment that no registered page maps."""
        nodes = np.arange(segment.base, segment.base + segment.rows, dtype=np.uint32)
        self.unpublish(nodes)
        self.dead_nodes -= segment.dead
        self._nodes.free(segment.base, segment.rows)
        at = int(np.searchsorted(self._bases, segment.base))
        del self.segments[at]
        self._bases = np.delete(self._bases, at)
        if self._by_ino.get(segment.ino) is segment:
            del self._by_ino[segment.ino]
        if segment.adopted:
            self._adopted_rows -= segment.rows
        if segment.handle is not None:
            segment.handle.close()

    def retire(self, segment: StableSegment) -> None:
        """Give up the handle of a segment. Those who map it keep it; nobody else can be given it."""
        self.unpublish(np.arange(segment.base, segment.base + segment.rows, dtype=np.uint32))
        handle, segment.handle = segment.handle, None
        if handle is not None:
            handle.close()

    def which(self, nodes: Ints) -> Ints:
        """For each node the position of its segment in `segments`."""
        return np.searchsorted(self._bases, nodes, "right") - 1

    # -- who uses them ----------------------------------------------------------------------------------

    def attach(self, nodes: Ints) -> None:
        """Add a sharer to each of the nodes (a node may be named more than once)."""
        if self.sharers.dtype == np.uint8 and len(nodes):
            ascending = bool((nodes[1:] > nodes[:-1]).all())
            most = 1 if ascending else int(np.bincount(nodes - nodes.min()).max())
            if int(self.sharers[nodes].max()) + most > np.iinfo(np.uint8).max:
                self._nodes.widen(1, np.uint16)
        np.add.at(self.sharers, nodes, self.sharers.dtype.type(1))
        self._recount(nodes)

    def detach(self, nodes: Ints) -> None:
        """Take a sharer off each of the nodes. Closes segments that are left without any."""
        np.subtract.at(self.sharers, nodes, self.sharers.dtype.type(1))
        self.close_unused(self._recount(nodes))

    def close_unused(self, segments: list[StableSegment]) -> None:
        """Close those of the segments that no registered page maps."""
        for segment in segments:
            if not segment.sharers:
                self.close(segment)

    def _recount(self, nodes: Ints) -> list[StableSegment]:
        which = self.which(nodes)
        which = which[np.flatnonzero(np.diff(which, prepend=-1))]  # mostly they come in order: few are left
        touched = [self.segments[i] for i in dict.fromkeys(which.tolist())]
        for segment in touched:
            sharers = self.sharers[segment.base : segment.base + segment.rows]
            live, total = int(np.count_nonzero(sharers)), int(sharers.sum(dtype=np.int64))
            self.pages_shared += live - segment.live
            self.dead_nodes -= live - segment.live
            self.sharers_total += total - segment.sharers
            segment.live, segment.sharers = live, total
        return touched

    def has_room(self, nodes: Ints) -> Bools:
        """Which nodes can take one more sharer, however often a node is named in `nodes`."""
        _, which, counts = np.unique(nodes, return_inverse=True, return_counts=True)
        return self.sharers[nodes].astype(np.int64) + counts[which] <= SHARERS_MAX

    # -- who can be merged with -------------------------------------------------------------------------

    def publish(self, nodes: U32) -> None:
        """Make nodes findable by their checksum from now on."""
        nodes = np.sort(nodes, kind="stable")  # new segments lie wherever there is room, but each in one piece
        if self.index.insert(nodes):
            self._chain(nodes, +1)

    def unpublish(self, nodes: U32) -> None:
        """Make nodes unfindable; those that were not findable are ignored."""
        self._chain(self.index.remove(nodes), -1)

    def _chain(self, nodes: U32, sign: int) -> None:
        """Keep `stable_node_chains` (checksums that have several nodes) and `stable_node_dups` (those nodes), when
        some went into the index (+1) or out of it (-1)."""
        if not len(nodes) or (sign < 0 and not self.dups):
            return
        in_order = np.sort(self.checksum[nodes])
        first = np.flatnonzero(np.concatenate(([True], in_order[1:] != in_order[:-1])))
        sums, more = in_order[first], np.diff(np.append(first, len(nodes)))
        here = self.index.count(sums)
        fewer, many = (here - more, here) if sign > 0 else (here, here + more)
        self.chains += sign * int(np.count_nonzero((many > 1) & (fewer <= 1)))
        self.dups += sign * int(many[many > 1].sum() - fewer[fewer > 1].sum())

    # -- whether it all agrees --------------------------------------------------------------------------

    def owns(self, nodes: Ints) -> Bools:
        """Which of these numbers are nodes of a segment."""
        ends = np.array([s.base + s.rows for s in self.segments], np.int64)
        bases = np.array([s.base for s in self.segments], np.int64)
        which = np.searchsorted(bases, nodes, "right") - 1
        owned: Bools = which >= 0
        owned[owned] = nodes[owned] < ends[which[owned]]
        return owned

    def problems(self) -> Iterator[str]:
        """What does not agree with the sharers of the nodes."""
        live = total = dead = adopted = 0
        taken = [(0, 0)]
        for segment in self.segments:
            sharers = self.sharers[segment.base : segment.base + segment.rows]
            counts = (int(np.count_nonzero(sharers)), int(sharers.sum(dtype=np.int64)))
            if counts != (segment.live, segment.sharers) or not segment.sharers:
                yield f"{segment} has {counts[0]} pages in use, by {counts[1]}"
            if not 0 < segment.live <= segment.size <= segment.rows <= SEGMENT_PAGES:
                yield f"{segment} is of an impossible size"
            live, total, dead = live + counts[0], total + counts[1], dead + segment.dead
            adopted += segment.rows if segment.adopted else 0
            taken.append((segment.base, segment.base + segment.rows))
        free = np.stack(self._nodes.free_ranges(), axis=1)
        taken = sorted(taken + [(first, last) for first, last in free.tolist()])
        if any(end != start for (_, end), (start, _) in pairwise(taken)):
            yield "nodes that are no segment's, or two's"
        if self._bases.tolist() != [s.base for s in self.segments] or not np.all(self._bases[1:] > self._bases[:-1]):
            yield "segments out of order"
        if any(s not in self.segments or s.ino != ino for ino, s in self._by_ino.items()):
            yield "an inode of a segment that is not there"
        if (live, total, dead, adopted) != (
            self.pages_shared,
            self.sharers_total,
            self.dead_nodes,
            self._adopted_rows,
        ):
            yield "the sums over segments are wrong"
        yield from self._problems_of_index()

    def _problems_of_index(self) -> Iterator[str]:
        entries = self.index.numbers().astype(np.int64)
        which = self.which(entries)
        handed_out = np.array([s.handle is not None for s in self.segments], np.bool_)
        if not self.owns(entries).all() or not handed_out[which].all():
            yield "nodes in the index that nobody can be given"
        groups = np.unique(self.checksum[entries], return_counts=True)[1]
        if (self.chains, self.dups) != (int(np.count_nonzero(groups > 1)), int(groups[groups > 1].sum())):
            yield "chains are counted wrong"

    def rebuild(self, nodes: Ints) -> Bools:
        """Make everything anew that follows from who uses which node: `nodes`, one entry a page, each of a segment.
        Returns which of the pages can be counted as users."""
        users = np.bincount(nodes, minlength=1)
        room: Bools = users[nodes] <= SHARERS_MAX
        users[users > SHARERS_MAX] = 0
        self.segments.sort(key=lambda s: s.base)
        used = [s for s in self.segments if users[s.base : s.base + s.rows].any()]
        for segment in self.segments:
            if segment not in used and segment.handle is not None:
                segment.handle.close()
        self._nodes.keep_only(*np.array([(s.base, s.rows) for s in used], np.int64).reshape(-1, 2).T)
        if self.sharers.dtype == np.uint8:
            self._nodes.widen(1, np.uint16)
        self.sharers[:] = 0
        self.sharers[: len(users)] = users
        self.segments, self._bases = used, np.array([s.base for s in used], np.int64)
        self._by_ino = {s.ino: s for s in used}
        self._adopted_rows = sum(s.rows for s in used if s.adopted)
        self.pages_shared = self.sharers_total = self.chains = self.dups = 0
        for segment in used:
            segment.live = segment.sharers = 0
        self.dead_nodes = sum(s.size for s in used)
        in_use = np.flatnonzero(self.sharers)
        self._recount(in_use)
        self.index.clear()
        for segment in used:
            if segment.handle is not None:
                first, past = np.searchsorted(in_use, (segment.base, segment.base + segment.rows))
                self.publish(in_use[first:past].astype(np.uint32))
        return room
