/* SPDX-License-Identifier: Apache-2.0 */
/* Three bits for every page of an area, in planes. */
#include "base/planes.h"
#include "base/check.h"
#include "base/real.h"

#include <sys/mman.h>

/* A leaf holds the bits of 1 GiB of addresses, if pages are 4 KiB. It is mapped whole but touched only as needed: 4 KiB
 * of it cover 128 MiB of addresses in one plane. */
#define LEAF_SHIFT 18
#define LEAF_PAGES (1UL << LEAF_SHIFT)
#define WORD_BITS (8 * sizeof(unsigned long))
#define NR_LEAVES (ADDRESS_END >> ARCH_PAGE_SHIFT_MIN >> LEAF_SHIFT)

struct leaf {
	unsigned long bits[NR_PLANES][LEAF_PAGES / WORD_BITS];
};

static struct leaf *leaves[NR_LEAVES];
static uint64_t first_leaf = NR_LEAVES, last_leaf; /* of the leaves that exist */

_Atomic bool pages_disturbed;

static struct leaf *leaf_of(uint64_t vpn)
{
	uint64_t i = vpn >> LEAF_SHIFT;

	return i < NR_LEAVES ? leaves[i] : NULL;
}

int page_reserve(uint64_t vpn, uint64_t end)
{
	for (uint64_t i = vpn >> LEAF_SHIFT; i <= (end - 1) >> LEAF_SHIFT && i < NR_LEAVES; i++) {
		void *p;

		if (leaves[i])
			continue;
		p = real.mmap(NULL, sizeof(struct leaf), PROT_READ | PROT_WRITE,
			      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		if (p == MAP_FAILED)
			return -ENOMEM;
		leaves[i] = p;
		first_leaf = i < first_leaf ? i : first_leaf;
		last_leaf = i > last_leaf ? i : last_leaf;
	}
	return 0;
}

bool page_test(enum page_plane plane, uint64_t vpn)
{
	const struct leaf *l = leaf_of(vpn);
	uint64_t at = vpn % LEAF_PAGES;

	return l && l->bits[plane][at / WORD_BITS] >> at % WORD_BITS & 1;
}

/* The bits of [vpn, end) that are in the same word as `vpn`, as a mask. *next is the first page of the next word, or
 * `end`. */
static unsigned long word_mask(uint64_t vpn, uint64_t end, uint64_t *next)
{
	uint64_t word_end = (vpn / WORD_BITS + 1) * WORD_BITS;
	uint64_t stop = end < word_end ? end : word_end;
	uint64_t n = stop - vpn;

	*next = stop;
	return (n == WORD_BITS ? ~0UL : (1UL << n) - 1) << vpn % WORD_BITS;
}

void page_set(enum page_plane plane, uint64_t vpn, uint64_t end, bool value)
{
	while (vpn < end) {
		struct leaf *l = leaf_of(vpn);
		uint64_t next;
		unsigned long mask = word_mask(vpn, end, &next);
		unsigned long *word;

		VM_BUG_ON(value && !l); /* nobody reserved it */
		if (!l) {
			vpn = (vpn | (LEAF_PAGES - 1)) + 1;
			continue;
		}
		word = &l->bits[plane][vpn % LEAF_PAGES / WORD_BITS];
		/* If nothing is set, don't write: that would touch a page of the leaf in vain. */
		if (value)
			*word |= mask;
		else if (*word & mask)
			*word &= ~mask;
		vpn = next;
	}
}

uint64_t page_next(enum page_plane plane, uint64_t vpn, uint64_t end, bool value)
{
	while (vpn < end) {
		const struct leaf *l = leaf_of(vpn);
		uint64_t next;
		unsigned long mask = word_mask(vpn, end, &next), word;

		if (!l) {
			if (!value)
				return vpn;
			vpn = (vpn | (LEAF_PAGES - 1)) + 1;
			continue;
		}
		word = l->bits[plane][vpn % LEAF_PAGES / WORD_BITS];
		word = (value ? word : ~word) & mask;
		if (word)
			return vpn - vpn % WORD_BITS + (uint64_t)__builtin_ctzl(word);
		vpn = next;
	}
	return end;
}

void page_forget_known(void)
{
	page_disturb();
	for (uint64_t i = first_leaf; i <= last_leaf && i < NR_LEAVES; i++)
		if (leaves[i]) {
			page_set(PAGE_KNOWN, i << LEAF_SHIFT, (i + 1) << LEAF_SHIFT, false);
			page_tell_islands(i << LEAF_SHIFT, (i + 1) << LEAF_SHIFT);
		}
}

void page_tell_islands(uint64_t vpn, uint64_t end)
{
	for (uint64_t stop; (vpn = page_next(PAGE_ISLAND, vpn, end, true)) < end; vpn = stop) {
		stop = page_next(PAGE_ISLAND, vpn, end, false);
		page_set(PAGE_KNOWN, vpn, stop, true);
	}
}

void page_move(uint64_t vpn, uint64_t end, uint64_t to)
{
	for (uint64_t at = vpn; at < end;) {
		uint64_t first = page_next(PAGE_SEGMENT, at, end, true);
		uint64_t last = page_next(PAGE_SEGMENT, first, end, false);

		page_set(PAGE_SEGMENT, to + (first - vpn), to + (last - vpn), true);
		page_set(PAGE_KNOWN, to + (first - vpn), to + (last - vpn), false); /* about what was there before */
		for (uint64_t p = first; p < last; p++)
			if (page_test(PAGE_ISLAND, p))
				page_set(PAGE_ISLAND, to + (p - vpn), to + (p - vpn) + 1, true);
		page_tell_islands(to + (first - vpn), to + (last - vpn));
		at = last;
	}
	page_set(PAGE_SEGMENT, vpn, end, false);
	page_set(PAGE_ISLAND, vpn, end, false);
}
