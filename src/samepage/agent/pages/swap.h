/* SPDX-License-Identifier: Apache-2.0 */
/* What donating, merging and the swap itself share. All of it is for the agent thread, under one hold of the
 * mmap_lock. */
#ifndef SAMEPAGE_PAGES_SWAP_H
#define SAMEPAGE_PAGES_SWAP_H

#include "base/area.h"
#include "kernel/kernel.h"
#include "pages/pages.h"

#include <sys/mman.h>

/* The seals of a segment. F_SEAL_SEAL is not required of other processes' segments. */
#define SEALS (F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

/* Pages of areas that are swapped under one hold of the lock. Pages that are neighbours in memory form a *row*,
 * which lies in one area and one mapping. If they are neighbours in the segment, too, they form a *piece*, which one mapping can
 * show. */
struct chunk {
	size_t n;			    /* pages, at most SECTION_MAX; with gaps between them, at most a section */
	uintptr_t addr[SECTION_MAX];	    /* ascending */
	const uint8_t *target[SECTION_MAX]; /* what each is to become: a page of the view, or zero_page */
	struct segment *segment;	    /* NULL: zeros */
	uint8_t *status;		    /* one a page */
	uintptr_t scratch;		    /* the window that pages are moved to */
	bool unpinned;			    /* reads_unpinned() */
	bool stale, unshared;		    /* busy pages may be free once they are written; they were written */
};

/* A segment, and which part of it, in pages, is in the view window. */
struct segment {
	int fd;
	uint64_t npages, start, end;
	bool limited, charged;	  /* mappings_limited(), mappings_charged() */
	bool lost;		  /* the view has a hole, so it must not be read */
	enum page_status refusal; /* why there is no view of the pages last asked for */
};

/* The most mappings made in one critical section: they take a hundred microseconds. */
#define PIECES_MAX 16

static inline uintptr_t scratch_at(const struct chunk *c, size_t k)
{
	return c->scratch + k * PAGE_SIZE;
}

static inline bool same_row(const struct chunk *c, size_t i)
{
	return c->addr[i] == c->addr[i - 1] + PAGE_SIZE;
}

/* Whether page i is of the same piece as the page before it. */
static inline bool same_piece(const struct chunk *c, size_t i)
{
	return same_row(c, i) && (!c->segment || c->target[i] == c->target[i - 1] + PAGE_SIZE);
}

/* The end of the row that page i is in; at most j. */
static inline size_t row_end(const struct chunk *c, size_t i, size_t j)
{
	size_t end = i + 1;

	while (end < j && same_row(c, end))
		end++;
	return end;
}

/* The status of a page that cannot be swapped because it is of this kind. */
static inline uint8_t status_of(uint8_t kind)
{
	if (kind == PAGE_FORKED) /* not every fork passes a wrapper */
		scan_forked();
	return kind == PAGE_FORKED ? BUSY : kind == PAGE_FILE ? REFUSED : GONE;
}

/* Whether pages of the area may be swapped, and copied for others. */
static inline bool may_swap(const struct area *a)
{
	/* Under mlockall(MCL_FUTURE) the kernel fills every new mapping at once. */
	if (area_new_flags() & AREA_LOCKED)
		return false;
	if (!area_mergeable(a) || (a->flags & (AREA_LOCKED | AREA_UNMERGING)) || a->prot != (PROT_READ | PROT_WRITE))
		return false;
	return kernel.swap == SP_SWAP_MOVE || kernel.swap == SP_SWAP_WP ||
	       (kernel.swap != SP_SWAP_NONE && (a->flags & AREA_QUIET));
}

bool page_equal(const struct chunk *c, size_t i, const void *page);
/* Maps the segment's pages, or the zero page, over those of pages [i, j) of the chunk that are equal, piece by
 * piece. */
void map_equal(const struct chunk *c, size_t i, size_t j, const bool *equal);
/* Follows writes again to those of pages [start, end) that are still anonymous. If they were `watched` for missing
 * pages, unregisters them first, which wakes the threads that wait there. */
void track_again(uintptr_t start, uintptr_t end, bool watched);
/* Swaps pages [i, j) of the chunk, which are a row, by write-protection (protect.c). */
void swap_by_protect(struct chunk *c, size_t i, size_t j);
/* The same by move, for rows or a part of one (move.c). */
void swap_by_move(struct chunk *c, size_t i, size_t j);
/* Empties the part of the scratch that n pages are moved to, and unlocks it in case the application locked all its
 * memory. False: that failed. */
bool scratch_ready(size_t n);
/* Swaps those pages of a chunk that may be swapped, and sets a status for each page. Needs the lock. */
void swap_chunk(struct chunk *c);
/* Finishes what a swap_chunk() that was killed in the middle had begun. Afterwards every page is in its place, and the
 * books say so. Needs the lock. */
void swap_recover(void);
/* move.c's part: brings home what is away and not DONE. */
void move_recover(void);
/* Gives back the originals that are left in the scratch; call it before a request is answered. False: they are still
 * there. */
bool scratch_drop(void);

/* home.c. Which of n pages of a scratch hold something: the truth about every move. False: the kernel does not say, so
 * all may. */
bool scratch_holds(uintptr_t scratch, size_t n, bool *here);
/* Brings those of n pages of a scratch that hold something and are not DONE home to page i of the chunk and the
 * following. Does not return before they are there. Returns whether the scratch is empty then. */
bool bring_home(struct chunk *c, size_t i, uintptr_t scratch, size_t n);
/* Gives [start, end) of an area the area's advice, if a page of it came home with a mapping of the scratch. */
void advise_home(uintptr_t start, uintptr_t end);

/* merge.c. Maps [view, view + len) of the view of a segment over what is mapped at `to`. Returns 0; or -errno, with the
 * old mapping still there or, rarely (window_give()), nothing. */
int view_give(struct segment *s, const uint8_t *view, size_t len, uintptr_t to);

#endif
