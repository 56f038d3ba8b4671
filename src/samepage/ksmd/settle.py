"""What becomes of candidates that could not be merged."""

from __future__ import annotations

import numpy as np

from samepage.ksmd.deferred import COLLIDED_LONGEST, LONGEST
from samepage.ksmd.domain import Domain
from samepage.ksmd.merge_work import MergeWork
from samepage.ksmd.rmap import PageState
from samepage.memory import U8, U32, PageStatus


def defer(domain: Domain, refs: U32, work: MergeWork, state: PageState = PageState.DEFERRED) -> None:
    """Pages that are tried again after some passes."""
    domain.set_states(refs, state)
    domain.deferred.defer(refs, work.passes, LONGEST if work.smart_scan else 0)


def collide(domain: Domain, refs: U32, work: MergeWork) -> None:
    """Pages compared different from others of equal checksum. Checksums of 64 bits hardly ever collide: either a page
    was written in between, or a process did not tell the truth of one. Honest processes must not be kept from each
    other for ever by that, so these pages are tried again, too."""
    domain.set_states(refs, PageState.COLLIDED)
    domain.deferred.defer(refs, work.passes, COLLIDED_LONGEST)


def failures(domain: Domain, refs: U32, status: U8, work: MergeWork) -> None:
    """Pages that could not be merged, by what was answered; DONE and DIFFERENT are the caller's."""
    domain.set_states(refs[status == PageStatus.GONE], PageState.UNTOUCHED)
    domain.set_states(refs[status == PageStatus.REFUSED], PageState.ALONE)
    defer(domain, refs[(status == PageStatus.BUSY) | (status == PageStatus.NOMEM)], work)
    defer(domain, refs[status == PageStatus.NOMAP], work, PageState.OVER_BUDGET)


def without_donor(domain: Domain, refs: U32, work: MergeWork) -> None:
    """Pages that found no donor that could give a copy, and donors that could not: mostly pages that a fork still
    shares. Of each content one page stands in the unstable index, as the first of them does in the kernel's tree, if
    no other page stands for it there or in the stable index. The others are tried again, and with them that one."""
    if not len(refs):
        return
    sums, first = np.unique(domain.checksum[refs], return_index=True)
    alone = (domain.unstable.find(sums) < 0) & (domain.stable.index.find(sums) < 0)
    stays = np.zeros(len(refs), np.bool_)
    stays[first[alone]] = True
    defer(domain, refs[~stays], work)
    domain.set_states(refs[stays], PageState.UNSHARED)
    domain.unstable.insert(refs[stays])
