/* SPDX-License-Identifier: Apache-2.0 */
/* Swapping by write-protection (swap.c explains both ways). */
#include "base/settings.h"
#include "kernel/headroom.h"
#include "kernel/holders.h"
#include "kernel/window.h"
#include "pages/swap.h"

#include <linux/userfaultfd.h>
#include <string.h>

#define HELD_TOGETHER 64 /* pages: if one of so many is held, all of them are left */

/* Sets BUSY for those of pages [i, j) of the chunk, a row of anonymous memory that is ours alone, that somebody holds,
 * and for some around them. A device, say, that held a page before it was write-protected goes on writing to it. */
static void find_held(struct chunk *c, size_t i, size_t j)
{
	uintptr_t start = c->addr[i], len = (j - i) * PAGE_SIZE;
	int err = room_for(len + WINDOW, settings.reserve) ? migrate(start, len) : -ENOMEM;

	unmigrated(start, len);
	if (!err)
		return;
	if (err != -EIO || j - i <= HELD_TOGETHER) {
		memset(c->status + i, err == -ENOMEM ? NOMEM : BUSY, j - i);
		return;
	}
	for (size_t end; i < j; i = end) {
		end = min_addr(i + HELD_TOGETHER, j);
		find_held(c, i, end);
	}
}

/* The same for those of pages [i, j) that are PAGE_OWN; the others get the status of their kind. */
static void find_unfit(struct chunk *c, size_t i, size_t j, const uint8_t *kind)
{
	for (size_t end; i < j; i = end) {
		for (end = i + 1; end < j && kind[end] == kind[i]; end++)
			;
		if (kind[i] != PAGE_OWN)
			memset(c->status + i, status_of(kind[i]), end - i);
		else if (kernel.swap == SP_SWAP_WP)
			find_held(c, i, end);
	}
}

void swap_by_protect(struct chunk *c, size_t i, size_t j)
{
	uintptr_t start = c->addr[i], len = (j - i) * PAGE_SIZE;
	bool equal[SECTION_MAX];
	uint8_t kind[SECTION_MAX];

	if (kernel.tracking)
		untrack(start, start + len);
	if ((kernel.swap == SP_SWAP_WP && !only_small_pages()) ||
	    uffd_register(kernel.wp, start, len, UFFDIO_REGISTER_MODE_WP) || uffd_protect(start, len, true) ||
	    page_kinds(start, j - i, kind + i)) {
		memset(c->status + i, REFUSED, j - i);
	} else {
		/* From here on nobody writes, except those who held a page before. */
		memset(c->status + i, DONE, j - i);
		find_unfit(c, i, j, kind);
		for (size_t k = i; k < j; k++) {
			equal[k] = c->status[k] == DONE && page_equal(c, k, (void *)c->addr[k]);
			if (c->status[k] == DONE && !equal[k])
				c->status[k] = DIFFERENT;
		}
		map_equal(c, i, j, equal);
	}
	uffd_release(&kernel.wp, start, len);
	track_again(start, start + len, false);
}
