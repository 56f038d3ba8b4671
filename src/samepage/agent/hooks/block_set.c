/* SPDX-License-Identifier: Apache-2.0 */
/*
 * All large blocks, free or in use. They are nodes of a treap ordered by address; the free ones are also nodes of
 * another, ordered by length.
 */
#include "base/check.h"
#include "base/real.h"
#include "hooks/blocks.h"

#include <sys/mman.h>

#define POOL (4 * PAGE_SIZE) /* bytes of nodes that are mapped at a time */

struct block_set blocks;

/* ---- nodes ------------------------------------------------------------------------------------------- */

bool blocks_reserve(size_t n)
{
	struct block *more;

	if (blocks.pooled >= n)
		return true;
	more = real.mmap(NULL, POOL, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (more == MAP_FAILED)
		return false;
	for (size_t i = 0; i < POOL / sizeof(*more); i++, blocks.pooled++) {
		more[i].older = blocks.pool;
		blocks.pool = &more[i];
	}
	return true;
}

/* ---- the treap --------------------------------------------------------------------------------------- */

size_t block_length(const struct block *b)
{
	return b->end - b->start;
}

/* Whether b comes before a block of length `len` at `start`. */
static bool before(enum order by, const struct block *b, size_t len, uintptr_t start)
{
	if (by == BY_LENGTH && block_length(b) != len)
		return block_length(b) < len;
	return b->start < start;
}

/* Joins two treaps; all of `low` comes before all of `high`. */
static struct block *join(enum order by, struct block *low, struct block *high)
{
	if (!low || !high)
		return low ? low : high;
	if (low->priority > high->priority) {
		low->right[by] = join(by, low->right[by], high);
		return low;
	}
	high->left[by] = join(by, low, high->left[by]);
	return high;
}

/* Parts a treap: *low gets what comes before a block of length `len` at `start`, *high the rest. */
static void part(enum order by, struct block *b, size_t len, uintptr_t start, struct block **low, struct block **high)
{
	if (!b) {
		*low = *high = NULL;
	} else if (before(by, b, len, start)) {
		*low = b;
		part(by, b->right[by], len, start, &b->right[by], high);
	} else {
		*high = b;
		part(by, b->left[by], len, start, low, &b->left[by]);
	}
}

static void attach(enum order by, struct block *b)
{
	struct block *low, *high;

	b->left[by] = b->right[by] = NULL;
	part(by, blocks.roots[by], block_length(b), b->start, &low, &high);
	blocks.roots[by] = join(by, join(by, low, b), high);
}

static void detach(enum order by, struct block *b)
{
	struct block *low, *self, *high;

	part(by, blocks.roots[by], block_length(b), b->start, &low, &high);
	part(by, high, block_length(b), b->start + 1, &self, &high);
	blocks.roots[by] = join(by, low, high);
}

struct block *block_behind(uintptr_t addr)
{
	struct block *found = NULL;

	for (struct block *b = blocks.roots[BY_ADDRESS]; b;) {
		if (b->end > addr) {
			found = b;
			b = b->left[BY_ADDRESS];
		} else {
			b = b->right[BY_ADDRESS];
		}
	}
	return found;
}

struct block *block_fitting(size_t len)
{
	struct block *found = NULL;

	for (struct block *b = blocks.roots[BY_LENGTH]; b;) {
		if (block_length(b) >= len) {
			found = b;
			b = b->left[BY_LENGTH];
		} else {
			b = b->right[BY_LENGTH];
		}
	}
	return found;
}

void block_place(struct block *b, uintptr_t start, uintptr_t end)
{
	if (b->start != start) {
		detach(BY_ADDRESS, b);
		b->start = start;
		attach(BY_ADDRESS, b);
	}
	b->end = end;
	if (!b->alone && start <= blocks.heap_end && end > blocks.heap_end)
		blocks.heap_end = end;
}

struct block *block_insert(uintptr_t start, uintptr_t end, bool alone)
{
	static unsigned random = 1;
	struct block *b = blocks.pool;

	VM_BUG_ON(!b); /* nobody reserved it */
	blocks.pool = b->older;
	blocks.pooled--;
	random = random * 1664525 + 1013904223;
	*b = (struct block){.start = start, .alone = alone, .priority = random >> 8};
	attach(BY_ADDRESS, b);
	block_place(b, start, end);
	return b;
}

/* ---- the free ones -------------------------------------------------------------------------------------- */

static void enlist(struct block *b)
{
	b->older = blocks.newest;
	b->newer = NULL;
	*(blocks.newest ? &blocks.newest->newer : &blocks.oldest) = b;
	blocks.newest = b;
}

static void unlist(struct block *b)
{
	*(b->older ? &b->older->newer : &blocks.oldest) = b->newer;
	*(b->newer ? &b->newer->older : &blocks.newest) = b->older;
}

void block_later(struct block *b)
{
	unlist(b);
	enlist(b);
}

void block_claim(struct block *b)
{
	detach(BY_LENGTH, b);
	unlist(b);
	b->free = false;
}

void block_remove(struct block *b)
{
	if (b->free)
		block_claim(b);
	detach(BY_ADDRESS, b);
	b->older = blocks.pool;
	blocks.pool = b;
	blocks.pooled++;
}

void block_retire(struct block *b, unsigned age)
{
	struct block *low = block_behind(b->start - 1), *high = block_behind(b->end);
	uintptr_t start;

	if (low->free && low->end == b->start) {
		age = blocks.calls - low->since > age ? blocks.calls - low->since : age;
		start = low->start;
		block_remove(low);
		b->start = start; /* nothing lies in between, so its place in the order stays the same */
	}
	if (high && high->free && high->start == b->end) {
		age = blocks.calls - high->since > age ? blocks.calls - high->since : age;
		b->end = high->end;
		block_remove(high);
	}
	b->free = true;
	b->alone = false;
	b->since = blocks.calls - age;
	attach(BY_LENGTH, b);
	enlist(b);
}
