/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What is known of every page of an area: three bits.
 *
 *   PAGE_SEGMENT  the mapping here is a private mapping of a segment, not anonymous memory. Discarding
 *                 it must give zeros, so whoever discards maps anonymous memory over it first.
 *   PAGE_ISLAND   inside such a mapping, this page has a private copy: its copy-on-write was broken.
 *                 UFFDIO_MOVE does not take it from there; restore.c makes it anonymous memory again.
 *   PAGE_KNOWN    the service was told that this page is merged. Of an island: is to be told that it is not.
 *
 * All need the mmap_lock. Page numbers, half-open ranges.
 */
#ifndef SAMEPAGE_BASE_PLANES_H
#define SAMEPAGE_BASE_PLANES_H

#include "base/page.h"

#include <stdatomic.h>

enum page_plane { PAGE_SEGMENT, PAGE_ISLAND, PAGE_KNOWN, NR_PLANES };

/* Makes sure that later sets cannot fail: 0 or -ENOMEM. */
int page_reserve(uint64_t vpn, uint64_t end);
bool page_test(enum page_plane plane, uint64_t vpn);
void page_set(enum page_plane plane, uint64_t vpn, uint64_t end, bool value);
/* The first page in [vpn, end) whose bit equals `value`, or end. */
uint64_t page_next(enum page_plane plane, uint64_t vpn, uint64_t end, bool value);
void page_forget_known(void);				 /* nothing is known to the service any more */
void page_tell_islands(uint64_t vpn, uint64_t end);	 /* it is to be told of islands here that it may not know of */
void page_move(uint64_t vpn, uint64_t end, uint64_t to); /* mremap: bits travel, KNOWN does not */

/* The next look (scan.c) is to be at everything, for something became of pages that no fault of the application's tells of.
 * Any thread, without the lock. */
extern _Atomic bool pages_disturbed;
static inline void page_disturb(void)
{
	atomic_store(&pages_disturbed, true);
}

#endif
