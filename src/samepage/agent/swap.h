/* SPDX-License-Identifier: Apache-2.0 */
/* What donating, merging and the swap itself share. */
#ifndef SAMEPAGE_SWAP_H
#define SAMEPAGE_SWAP_H

#include "agent.h"

#include <sys/mman.h>

/* What makes a memfd a segment; F_SEAL_SEAL is not asked of others. */
#define SEALS (F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

/* Pages of one area: what is swapped under one hold of the lock. Those that stand in a row in memory are a *row*, which lies
 * in one mapping; where they do so in the segment, too, a *piece*, which takes one. */
struct chunk {
	size_t n;		     /* pages, at most SECTION_MAX; if there is a gap between them, at most a section */
	uintptr_t addr[SECTION_MAX]; /* ascending */
	const uint8_t *target[SECTION_MAX]; /* what each is to be: a page in the view of the segment, or zero_page */
	const struct segment *segment;	    /* NULL: zeros */
	uint8_t *status;		    /* one a page */
	const struct area *area;
	uintptr_t scratch; /* the window that pages are moved to */
};

/* A segment, and what of it is in the view window, in pages. */
struct segment {
	int fd;
	uint64_t npages, start, end;
};

/* Mappings made in one critical section: a hundred microseconds' worth. */
#define PIECES_MAX 16

static inline uintptr_t scratch_at(const struct chunk *c, size_t k)
{
	return c->scratch + k * PAGE_SIZE;
}

static inline bool same_row(const struct chunk *c, size_t i)
{
	return c->addr[i] == c->addr[i - 1] + PAGE_SIZE;
}

/* Of a page that cannot be swapped because of what stands there. */
static inline uint8_t status_of(uint8_t kind)
{
	return kind == PAGE_FORKED ? BUSY : kind == PAGE_FILE ? REFUSED : GONE;
}

/* Whether pages of the area may be swapped, and copied for others. */
static inline bool may_swap(const struct area *a)
{
	if (!area_mergeable(a) || (a->flags & (AREA_LOCKED | AREA_UNMERGING)) || a->prot != (PROT_READ | PROT_WRITE))
		return false;
	return kernel.swap == SP_SWAP_MOVE || kernel.swap == SP_SWAP_WP ||
	       (kernel.swap == SP_SWAP_QUIET && (a->flags & AREA_QUIET));
}

/* Swaps what may be swapped of a chunk, and says what became of each page. Needs the lock. */
void swap_chunk(struct chunk *c);
/* Gives back originals that are left in the scratch; before a request is answered. */
void scratch_drop(void);

#endif
