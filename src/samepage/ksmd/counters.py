"""What ksmd shows of itself: KSM's names and meanings (admin-guide/mm/ksm.rst), and a few that KSM has no need of.

These hold in every snapshot:

- `pages_shared + pages_sharing + pages_unshared + pages_volatile` is the sum of `ksm_rmap_items` over the processes;
- `pages_shared + pages_sharing` pages of registered processes are merged with segments, `ksm_zero_pages` with the
  zero page; together they are the sum of `merged` over the processes;
- `bytes_saved` is `pages_sharing`, less `pages_inherited` and `pages_dead`, plus `ksm_zero_pages`, in bytes. Pages
  that share by fork would share without us, and segment pages that nobody maps are memory all the same. So it is
  less than nothing when segments hold more than merging freed, and never more than PSS shows;
- `general_profit` is `bytes_saved` less `metadata_bytes`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from samepage.arrays import Ints
from samepage.ksmd.domain import Domain
from samepage.ksmd.mm_slot import MmSlot, in_no_tree_of, merged_of, rmap_items_of
from samepage.ksmd.rmap import PageState
from samepage.memory import NO_STALLS, PAGE_SIZE, PageStatus, Stalls
from samepage.process.merge_domain import MergeDomain


@dataclass(slots=True, frozen=True)
class ProcessRow:
    """One process. Counts are of pages."""

    pid: int
    comm: str
    swap: str
    """How pages are swapped under the process's threads: a property of its agent, "" if not said."""
    state: str
    """Whether it answers: "running", or why not ("stopped", "traced", "frozen")."""
    unmerge_pending: bool
    """It did not answer when it was to be unmerged, and will be unmerged as soon as it answers."""
    domain: MergeDomain
    owner: MergeDomain
    """Whose process it is: the merge domain it would be in without a policy."""
    ksm_rmap_items: int
    """Pages that are known; not those merged with the zero page."""
    ksm_merging_pages: int
    """Pages merged with segments."""
    ksm_zero_pages: int
    """Pages merged with the zero page."""
    merged: int
    """The sum of both."""
    bytes_needed: int
    """The bytes that private copies of all merged pages would take."""
    pages_inherited: int
    pages_broken: int
    """Pages that were merged, and have a private copy again that was not looked at since."""
    pages_deferred: int
    """Matched pages that could not be merged and will be tried again."""
    pages_unmerged_vma: int
    """Matched pages left unmerged because the process has too few mappings (`vm.max_map_count`)."""
    ksm_merge_any: bool
    """PR_SET_MEMORY_MERGE is in force."""
    ksm_mergeable: bool
    """It has mergeable areas."""
    ksm_process_profit: int
    """Bytes of merged pages, less what ksmd spends on knowing this process's pages (nine bytes each)."""
    cpu_seconds: float
    """CPU time that the process itself spent for ksmd."""
    stalls: Stalls = NO_STALLS
    """How its threads were held up."""


@dataclass(slots=True, frozen=True)
class Counters:
    """All processes together. Counts are of pages where nothing else is said."""

    run: int = 0
    pages_shared: int = 0
    """Stable nodes in use."""
    pages_sharing: int = 0
    """How many more pages map the stable nodes: roughly the pages saved, but see `bytes_saved`."""
    pages_unshared: int = 0
    """Pages in the unstable index: looked at again and again for nothing."""
    pages_volatile: int = 0
    """Known, and in neither tree, as KSM counts them: changing too fast, waiting to have been the same for a whole
    pass, or one of those that the next few count by the reason."""
    pages_inherited: int = 0
    """Of `pages_sharing`: shared by fork, not by us."""
    pages_dead: int = 0
    """Pages of segments that no registered process maps."""
    pages_broken: int = 0
    pages_deferred: int = 0
    pages_unmerged_vma: int = 0
    pages_collided: int = 0
    """Pages that differed from a page of equal checksum; left alone until they change."""
    ksm_zero_pages: int = 0
    full_scans: int = 0
    pages_scanned: int = 0
    """Pages hashed so far."""
    pages_skipped: int = 0
    """Pages skipped so far because the kernel said they had not been written."""
    stable_node_chains: int = 0
    stable_node_dups: int = 0
    segments: int = 0
    bytes_saved: int = 0
    general_profit: int = 0
    metadata_bytes: int = 0
    cpu_seconds: float = 0.0
    """CPU time of ksmd and, on its behalf, of the processes."""
    merge_failures: dict[str, int] = field(default_factory=dict)
    """Failures so far, by name of `PageStatus`."""


@dataclass(slots=True, frozen=True)
class DomainRow:
    """One merge domain. Over all domains each of these adds up to the counter of that name."""

    domain: MergeDomain
    pages_shared: int
    pages_sharing: int
    pages_inherited: int
    pages_dead: int
    ksm_zero_pages: int
    bytes_saved: int
    metadata_bytes: int


class ProcessFacts(NamedTuple):
    """What of a process its row is made of: copied after every batch, for all processes, so there is little of it."""

    slot: MmSlot
    """Only what of it never changes is read later."""
    counts: Ints
    silent: str
    owes: bool
    merge_any: bool
    mergeable: bool
    cpu_ns: int
    stalls: Stalls


@dataclass(frozen=True)
class Snapshot:
    """Everything that is shown, of one moment."""

    counters: Counters = field(default_factory=Counters)
    domains: tuple[DomainRow, ...] = ()
    make_rows: Callable[[], tuple[ProcessRow, ...]] = tuple

    @cached_property
    def processes(self) -> tuple[ProcessRow, ...]:
        """A row for each process. Rows are made when somebody reads them: most snapshots are read by nobody."""
        return self.make_rows()


FAILURES = [(int(status), status.name) for status in PageStatus if status != PageStatus.DONE]


def process_facts(slot: MmSlot) -> ProcessFacts:
    """What of a process is as it is now."""
    mergeable = len(slot.areas) > 0
    return ProcessFacts(
        slot, slot.counts.copy(), slot.silent, bool(slot.owed), slot.merge_any, mergeable, slot.cpu_ns, slot.stalls
    )


def process_rows(facts: list[ProcessFacts]) -> tuple[ProcessRow, ...]:
    """A snapshot of processes."""
    return tuple(map(process_row, facts))


def process_row(facts: ProcessFacts) -> ProcessRow:
    """A snapshot of one process."""
    slot, n = facts.slot, facts.counts.tolist()
    rmap_items, merged = rmap_items_of(n), merged_of(n)
    merging = n[PageState.MERGED] + n[PageState.INHERITED]
    own = n[PageState.MERGED] + n[PageState.ZERO]
    return ProcessRow(
        pid=slot.pid,
        comm=slot.comm,
        swap=slot.swap,
        state=facts.silent or "running",
        unmerge_pending=facts.owes,
        domain=slot.domain.key,
        owner=slot.space.owner,
        ksm_rmap_items=rmap_items,
        ksm_merging_pages=merging,
        ksm_zero_pages=n[PageState.ZERO],
        merged=merged,
        bytes_needed=merged * PAGE_SIZE,
        pages_inherited=n[PageState.INHERITED],
        pages_broken=n[PageState.BROKEN],
        pages_deferred=n[PageState.DEFERRED],
        pages_unmerged_vma=n[PageState.OVER_BUDGET],
        ksm_merge_any=facts.merge_any,
        ksm_mergeable=facts.mergeable,
        ksm_process_profit=own * PAGE_SIZE - 9 * rmap_items,
        cpu_seconds=facts.cpu_ns / 1e9,
        stalls=facts.stalls,
    )


def _counts(domain: Domain) -> list[int]:
    """Pages of all its processes by `PageState`."""
    counts = [slot.counts for slot in domain.slots]
    total: list[int] = np.sum(counts, axis=0).tolist() if counts else [0] * len(PageState)
    return total


def domain_row(domain: Domain) -> DomainRow:
    """A snapshot of one domain."""
    n = _counts(domain)
    inherited, zero = n[PageState.INHERITED], n[PageState.ZERO]
    tree = domain.stable
    sharing = tree.sharers_total - tree.pages_shared
    return DomainRow(
        domain=domain.key,
        pages_shared=tree.pages_shared,
        pages_sharing=sharing,
        pages_inherited=inherited,
        pages_dead=tree.dead_nodes,
        ksm_zero_pages=zero,
        bytes_saved=(sharing - inherited - tree.dead_nodes + zero) * PAGE_SIZE,
        metadata_bytes=domain.nbytes(),
    )


SUMMED = ("pages_shared", "pages_sharing", "pages_inherited", "pages_dead", "ksm_zero_pages", "bytes_saved")


def total(domains: list[Domain], rows: tuple[DomainRow, ...]) -> dict[str, int]:
    """The counters that are sums over the pages known now. `rows` are those of the domains."""
    n = [sum(of) for of in zip([0] * len(PageState), *map(_counts, domains), strict=True)]
    trees = [domain.stable for domain in domains]
    sums = {name: sum(getattr(row, name) for row in rows) for name in SUMMED}
    metadata_bytes = sum(row.metadata_bytes for row in rows)
    return sums | {
        "pages_unshared": n[PageState.UNSHARED],
        "pages_volatile": in_no_tree_of(n),
        "pages_broken": n[PageState.BROKEN],
        "pages_deferred": n[PageState.DEFERRED],
        "pages_unmerged_vma": n[PageState.OVER_BUDGET],
        "pages_collided": n[PageState.COLLIDED],
        "stable_node_chains": sum(tree.chains for tree in trees),
        "stable_node_dups": sum(tree.dups for tree in trees),
        "segments": sum(len(tree.segments) for tree in trees),
        "general_profit": sums["bytes_saved"] - metadata_bytes,
        "metadata_bytes": metadata_bytes,
    }


def failures(statuses: list[int]) -> dict[str, int]:
    """Merge failures by name."""
    return {name: statuses[status] for status, name in FAILURES}
