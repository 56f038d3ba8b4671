/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tests the set of large blocks (block_set.c) against a model that keeps every page separately: random blocks are
 * inserted, moved, retired, claimed and removed.
 *
 * Usage: blocks_model OPERATIONS SEED. Exit status 0, or 1 after saying what was wrong.
 */
#include "base/check.h"
#include "base/real.h"
#include "hooks/blocks.h"

#include "model.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#define PAGES 2048UL
#define BASE 0x7f0000000000UL

enum { NONE, USED, FREE };

static struct {
	int what;
	unsigned first; /* page of the block that it is in */
} model[PAGES];

struct real real = {.mmap = mmap};

void check_failed(const char *what)
{
	printf("operation %lu: %s\n", operation, what);
	exit(1);
}

static uintptr_t address(unsigned long page)
{
	return BASE + page * PAGE_SIZE;
}

static void mark(unsigned long from, unsigned long to, int what, unsigned first)
{
	for (; from < to; from++) {
		model[from].what = what;
		model[from].first = first;
	}
}

static unsigned long end_of(unsigned long page)
{
	unsigned long end = page;

	while (end < PAGES && model[end].what == model[page].what &&
	       (model[page].what == NONE || model[end].first == model[page].first))
		end++;
	return end;
}

/* Free neighbours are one block. */
static void join_free(void)
{
	for (unsigned long at = 1; at < PAGES; at++)
		if (model[at].what == FREE && model[at - 1].what == FREE)
			model[at].first = model[at - 1].first;
}

static struct block *block_of(unsigned long page)
{
	struct block *b = block_behind(address(page));

	CHECK(b && b->start == address(model[page].first) && b->end == address(end_of(page)));
	CHECK(b->free == (model[page].what == FREE));
	return b;
}

static void verify(void)
{
	unsigned long longest = 0, free = 0, listed = 0;
	const struct block *behind = NULL;

	for (unsigned long at = 0, end; at < PAGES; at = end) {
		end = end_of(at);
		if (model[at].what == NONE)
			continue;
		block_of(at);
		if (model[at].what == FREE) {
			free++;
			longest = end - at > longest ? end - at : longest;
		}
	}
	for (const struct block *b = blocks.oldest; b; behind = b, b = b->newer, listed++)
		CHECK(b->free && b->older == behind);
	CHECK(blocks.newest == behind && listed == free);
	CHECK(!block_fitting((longest + 1) * PAGE_SIZE));
	for (unsigned long n = 1; n <= longest; n += 1 + n / 4) {
		const struct block *b = block_fitting(n * PAGE_SIZE);

		CHECK(b && b->free && b->end - b->start >= n * PAGE_SIZE);
		for (unsigned long at = 0; at < PAGES; at = end_of(at))
			CHECK(model[at].what != FREE || end_of(at) - at < n ||
			      (end_of(at) - at) * PAGE_SIZE >= b->end - b->start);
	}
}

static void step(void)
{
	unsigned long at = (unsigned long)random() % PAGES, end = end_of(at), n = 1 + (unsigned long)random() % 40;
	struct block *b;

	blocks.calls++;
	CHECK(blocks_reserve(1));
	if (model[at].what == NONE) {
		end = end - at < n ? end : at + n;
		block_insert(address(at), address(end), true);
		mark(at, end, USED, (unsigned)at);
		return;
	}
	b = block_of(at);
	at = model[at].first;
	if (model[at].what == FREE) {
		if (random() % 2)
			block_claim(b);
		else
			block_later(b);
		mark(at, end, b->free ? FREE : USED, (unsigned)at);
	} else if (random() % 8 == 0) {
		block_remove(b);
		mark(at, end, NONE, 0);
	} else if (random() % 3 == 0 && end - at > 1) { /* what is cut off belongs to nobody */
		unsigned long cut = at + 1 + (unsigned long)random() % (end - at - 1);

		if (random() % 2) {
			block_place(b, address(at), address(cut));
			mark(cut, end, NONE, 0);
		} else {
			block_place(b, address(cut), address(end));
			mark(cut, end, USED, (unsigned)cut);
			mark(at, cut, NONE, 0);
		}
	} else {
		block_retire(b, (unsigned)random() % 100);
		mark(at, end, FREE, (unsigned)at);
		join_free();
	}
}

int main(int argc, char **argv)
{
	unsigned long operations = argc > 1 ? strtoul(argv[1], NULL, 10) : 0;

	srandom(argc > 2 ? (unsigned)strtoul(argv[2], NULL, 10) : 1);
	for (; operation < operations; operation++) {
		step();
		if (operation % 16 == 0)
			verify();
	}
	return 0;
}
