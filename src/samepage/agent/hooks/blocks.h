/* SPDX-License-Identifier: Apache-2.0 */
/* What blocks.c and block_set.c share. All needs the mmap_lock. */
#ifndef SAMEPAGE_HOOKS_BLOCKS_H
#define SAMEPAGE_HOOKS_BLOCKS_H

#include "hooks/hooks.h"

enum order { BY_ADDRESS, BY_LENGTH, NR_ORDERS }; /* of the same length, the one at the lower address first */

struct block {
	uintptr_t start, end;
	struct block *left[NR_ORDERS], *right[NR_ORDERS];
	struct block *older, *newer; /* the free ones */
	unsigned priority;
	unsigned since; /* it is free: a number of a call */
	bool free, alone;
};

extern struct block_set {
	struct block *roots[NR_ORDERS];
	struct block *oldest, *newest; /* of the free ones, in the order in which decay() looks at them */
	struct block *pool;	       /* nodes of nothing, by `older` */
	size_t pooled;
	uintptr_t heap_end; /* 0: there is no heap yet */
	unsigned calls;	    /* allocations and frees */
} blocks;

/* Makes sure that n nodes can be had. */
bool blocks_reserve(size_t n);
/* The first block that ends after `addr`, or NULL. */
struct block *block_behind(uintptr_t addr);
/* The shortest free block of that length at least, or NULL. */
struct block *block_fitting(size_t len);
/* A new one, not free. Needs a node. */
struct block *block_insert(uintptr_t start, uintptr_t end, bool alone);
void block_remove(struct block *b);
/* Sets the bounds of a block that is not free. */
void block_place(struct block *b, uintptr_t start, uintptr_t end);
/* Makes a block a free one, joined with its free neighbours. It is as old as the oldest of them: else what nobody needs would
 * stay for ever where a part of it is used. */
void block_retire(struct block *b, unsigned age);
/* Takes a block out of the free ones. */
void block_claim(struct block *b);
/* Puts a free one last in the order in which they are looked at. */
void block_later(struct block *b);

#endif
