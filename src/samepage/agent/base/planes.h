/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Three bits for every page of an area.
 *
 *   PAGE_SEGMENT  the mapping here is a private mapping of a segment, not anonymous memory. Discarding
 *                 it must give zeros, so whoever discards maps anonymous memory over it first.
 *   PAGE_ISLAND   inside such a mapping, this page has a private copy: its copy-on-write was broken.
 *                 UFFDIO_MOVE does not take it from there; restore.c makes it anonymous memory again.
 *   PAGE_KNOWN    the service was told that this page is merged. Of an island: is to be told that it is not.
 *
 * Callers hold the mmap_lock. Ranges are half-open, in page numbers.
 */
#ifndef SAMEPAGE_BASE_PLANES_H
#define SAMEPAGE_BASE_PLANES_H

#include "base/page.h"

#include <stdatomic.h>

enum page_plane { PAGE_SEGMENT, PAGE_ISLAND, PAGE_KNOWN, NR_PLANES };

/* Makes sure that later sets cannot fail. Returns 0 or -ENOMEM. */
int page_reserve(uint64_t vpn, uint64_t end);
bool page_test(enum page_plane plane, uint64_t vpn);
void page_set(enum page_plane plane, uint64_t vpn, uint64_t end, bool value);
/* The first page in [vpn, end) whose bit equals `value`, or end. */
uint64_t page_next(enum page_plane plane, uint64_t vpn, uint64_t end, bool value);
void page_forget_known(void);				 /* the service knows nothing any more */
void page_tell_islands(uint64_t vpn, uint64_t end);	 /* the service is told of the islands here, which it may not
							  * know of */
void page_move(uint64_t vpn, uint64_t end, uint64_t to); /* mremap: moves the bits, but not KNOWN */

/* Makes the next look (scan.c) look at everything, because pages changed in a way that no fault of the application's
 * tells of. For any thread, without the lock. */
extern _Atomic bool pages_disturbed;
static inline void page_disturb(void)
{
	atomic_store(&pages_disturbed, true);
}

#endif
