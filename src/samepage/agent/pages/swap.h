/* SPDX-License-Identifier: Apache-2.0 */
/* What donating, merging and the swap itself share. All is the agent thread's, under one hold of the mmap_lock. */
#ifndef SAMEPAGE_PAGES_SWAP_H
#define SAMEPAGE_PAGES_SWAP_H

#include "base/area.h"
#include "kernel/kernel.h"
#include "pages/pages.h"

#include <sys/mman.h>

/* What makes a memfd a segment; F_SEAL_SEAL is not asked of others. */
#define SEALS (F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

/* Pages of one area: what is swapped under one hold of the lock. Those that stand in a row in memory are a *row*, which lies
 * in one mapping; where they do so in the segment, too, a *piece*, which takes one. */
struct chunk {
	size_t n;		     /* pages, at most SECTION_MAX; if there is a gap between them, at most a section */
	uintptr_t addr[SECTION_MAX]; /* ascending */
	const uint8_t *target[SECTION_MAX]; /* what each is to be: a page in the view of the segment, or zero_page */
	struct segment *segment;	    /* NULL: zeros */
	uint8_t *status;		    /* one a page */
	const struct area *area;
	uintptr_t scratch;    /* the window that pages are moved to */
	bool unpinned;	      /* reads_unpinned() */
	bool stale, unshared; /* pages were busy that may not be any more when they are written; they were */
};

/* A segment, and what of it is in the view window, in pages. */
struct segment {
	int fd;
	uint64_t npages, start, end;
	bool limited, charged;	  /* mappings_limited(), mappings_charged() */
	bool lost;		  /* the view has a hole: nobody may look into it */
	enum page_status refusal; /* why there is no view of what was asked for last */
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

/* Whether page i continues the piece that the page before it is of. */
static inline bool same_piece(const struct chunk *c, size_t i)
{
	return same_row(c, i) && (!c->segment || c->target[i] == c->target[i - 1] + PAGE_SIZE);
}

/* The end of the row that page i is of, before j. */
static inline size_t row_end(const struct chunk *c, size_t i, size_t j)
{
	size_t end = i + 1;

	while (end < j && same_row(c, end))
		end++;
	return end;
}

/* Of a page that cannot be swapped because of what stands there. */
static inline uint8_t status_of(uint8_t kind)
{
	return kind == PAGE_FORKED ? BUSY : kind == PAGE_FILE ? REFUSED : GONE;
}

/* Whether pages of the area may be swapped, and copied for others. */
static inline bool may_swap(const struct area *a)
{
	/* Under mlockall(MCL_FUTURE) whatever is mapped is filled at once. */
	if (area_new_flags() & AREA_LOCKED)
		return false;
	if (!area_mergeable(a) || (a->flags & (AREA_LOCKED | AREA_UNMERGING)) || a->prot != (PROT_READ | PROT_WRITE))
		return false;
	return kernel.swap == SP_SWAP_MOVE || kernel.swap == SP_SWAP_WP ||
	       (kernel.swap != SP_SWAP_NONE && (a->flags & AREA_QUIET));
}

bool page_equal(const struct chunk *c, size_t i, const void *page);
/* Puts the segment's pages, or the zero page, over those of pages [i, j) of the chunk that are equal, piece by piece. */
void map_equal(const struct chunk *c, size_t i, size_t j, const bool *equal);
/* Has what stayed anonymous of pages [start, end) followed again as all such memory is. Unregistering it before, where it
 * was watched for missing pages, wakes who waits there. */
void track_again(uintptr_t start, uintptr_t end, bool watched);
/* Swaps pages [i, j) of the chunk, which are a row, by write-protection (protect.c). */
void swap_by_protect(struct chunk *c, size_t i, size_t j);
/* The same by move, of rows or a part of one (move.c). */
void swap_by_move(struct chunk *c, size_t i, size_t j);
/* Empties what n pages are moved to, and unlocks it, whatever the application did to all its memory. False: it is not. */
bool scratch_ready(size_t n);
/* Swaps what may be swapped of a chunk, and says what became of each page. Needs the lock. */
void swap_chunk(struct chunk *c);
/* Finishes what a swap_chunk() that was killed in the middle had begun: every page is in its place afterwards. Needs the lock. */
void swap_recover(void);
/* Gives back originals that are left in the scratch; before a request is answered. False: they still are there. */
bool scratch_drop(void);

/* home.c. Which of n pages of a scratch hold something: the truth about every move. False: the kernel does not say, so all
 * may. */
bool scratch_holds(uintptr_t scratch, size_t n, bool *here);
/* Brings what n pages of a scratch hold, and is not DONE, home to page i of the chunk on. Does not return before it is there.
 * Whether the scratch is empty then. */
bool bring_home(struct chunk *c, size_t i, uintptr_t scratch, size_t n);

/* merge.c. Puts [view, view + len) of the view of a segment over what stands at `to`. 0; or -errno, and it still stands there,
 * or (window_give()) nothing does. */
int view_give(struct segment *s, const uint8_t *view, size_t len, uintptr_t to);

#endif
