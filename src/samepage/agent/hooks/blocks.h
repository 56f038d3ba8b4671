/* SPDX-License-Identifier: Apache-2.0 */
/* What blocks.c and block_set.c share. Callers hold the mmap_lock. */
#ifndef SAMEPAGE_HOOKS_BLOCKS_H
#define SAMEPAGE_HOOKS_BLOCKS_H

#include "hooks/hooks.h"

enum order { BY_ADDRESS, BY_LENGTH, NR_ORDERS }; /* blocks of the same length are ordered by address */

struct block {
	uintptr_t start, end;
	struct block *left[NR_ORDERS], *right[NR_ORDERS];
	struct block *older, *newer; /* neighbours in the list of free blocks */
	unsigned priority;
	unsigned since; /* blocks.calls when it became free */
	bool free, alone;
};

extern struct block_set {
	struct block *roots[NR_ORDERS];
	struct block *oldest, *newest; /* free blocks, in the order in which decay() looks at them */
	struct block *pool;	       /* unused nodes, linked by `older` */
	size_t pooled;
	uintptr_t heap_end; /* 0: there is no heap yet */
	unsigned calls;	    /* allocations and frees */
} blocks;

/* Makes sure that n nodes are in the pool. False: there is no memory. */
bool blocks_reserve(size_t n);
/* The first block that ends after `addr`, or NULL. */
struct block *block_behind(uintptr_t addr);
/* The shortest free block of at least that length, or NULL. */
struct block *block_fitting(size_t len);
/* Adds a block that is in use. Needs a node. */
struct block *block_insert(uintptr_t start, uintptr_t end, bool alone);
void block_remove(struct block *b);
/* Sets the bounds of a block that is in use. */
void block_place(struct block *b, uintptr_t start, uintptr_t end);
/* Makes a block free and joins it with its free neighbours. The result is as old as the oldest of them: otherwise
 * memory that nobody needs would stay for ever if a part of it is used again and again. */
void block_retire(struct block *b, unsigned age);
/* Marks a free block as in use. */
void block_claim(struct block *b);
/* Makes a free block the last that decay() looks at. */
void block_later(struct block *b);

/* ---- kept.c: without the lock, but for the last three ---- */

/* A block of that length, which is in use from now on; 0: none is kept. */
uintptr_t kept_take(size_t len);
/* A block that its user frees. False: it is as it was, and not kept. */
bool kept_put(uintptr_t start);
/* Says how long a block is that somebody uses, and that this is not known any more. A block that is mapped alone must
 * not be kept. */
void kept_note(uintptr_t start, size_t len);
void kept_forget(uintptr_t start);
bool is_kept(uintptr_t start);
/* Frees all that is kept. Returns whether there was any. */
bool kept_release(void);
/* The same, only what is kept until the next allocation. */
void kept_release_long(void);
/* How many bytes may be kept; 0: frees all, and keeps no more. */
void kept_limit(size_t len);

#endif
