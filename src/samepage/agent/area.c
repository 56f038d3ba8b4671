/* SPDX-License-Identifier: Apache-2.0 */
/* Areas: whose memory the agent may touch. */
#include "agent.h"

#include <string.h>
#include <sys/mman.h>

static struct area *areas; /* ascending, disjoint */
static unsigned long capacity;
_Atomic unsigned long nr_areas;
uint64_t areas_seq = 1;

_Atomic bool merge_any;

static bool mergeable(unsigned flags)
{
	return flags & (AREA_ALLOC | AREA_ADVISED | (merge_any ? AREA_MAPPED : 0)) &&
	       !(flags & (AREA_EXCLUDED | AREA_UNMERGED));
}

bool area_mergeable(const struct area *a)
{
	return mergeable(a->flags);
}

bool any_mergeable(void)
{
	for (unsigned long i = 0; i < nr_areas; i++)
		if (mergeable(areas[i].flags))
			return true;
	return false;
}

void area_merge_any(bool on)
{
	merge_any = on;
	for (unsigned long i = 0; on && i < nr_areas; i++)
		if (mergeable(areas[i].flags) && page_reserve(areas[i].start >> PAGE_SHIFT, areas[i].end >> PAGE_SHIFT))
			areas[i].flags |= AREA_EXCLUDED;
	areas_seq++;
}

unsigned long area_index(const struct area *a)
{
	return (unsigned long)(a - areas);
}

/* Index of the first area that ends after `addr`. */
static unsigned long lower(uintptr_t addr)
{
	unsigned long lo = 0, hi = nr_areas;

	while (lo < hi) {
		unsigned long mid = (lo + hi) / 2;

		if (areas[mid].end > addr)
			hi = mid;
		else
			lo = mid + 1;
	}
	return lo;
}

struct area *area_next(uintptr_t addr)
{
	unsigned long i = lower(addr);

	return i < nr_areas ? &areas[i] : NULL;
}

bool area_overlaps(uintptr_t start, uintptr_t end)
{
	const struct area *a = area_next(start);

	return a && a->start < end;
}

/* Room for `more` areas beyond those there are: every operation below asks for its worst case first. */
static int make_room(unsigned long more)
{
	unsigned long want = nr_areas + more;
	unsigned long bytes = capacity * sizeof(*areas), bigger;
	void *p;

	if (want <= capacity)
		return 0;
	bigger = bytes ? bytes * 2 : 4 * PAGE_SIZE;
	p = areas ? real.mremap(areas, bytes, bigger, MREMAP_MAYMOVE)
		  : real.mmap(NULL, bigger, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (p == MAP_FAILED)
		return -ENOMEM;
	areas = p;
	capacity = bigger / sizeof(*areas);
	return 0;
}

static void insert(unsigned long i, struct area a)
{
	memmove(&areas[i + 1], &areas[i], (nr_areas - i) * sizeof(*areas));
	areas[i] = a;
	nr_areas++;
}

static void delete(unsigned long i)
{
	memmove(&areas[i], &areas[i + 1], (nr_areas - i - 1) * sizeof(*areas));
	nr_areas--;
}

/* Makes `addr` a boundary between areas, if it lies inside one. Needs room for one more. */
static void split_at(uintptr_t addr)
{
	unsigned long i = lower(addr);

	if (i < nr_areas && areas[i].start < addr) {
		struct area right = areas[i];

		areas[i].end = addr;
		right.start = addr;
		insert(i + 1, right);
	}
}

static bool same_kind(const struct area *a, const struct area *b)
{
	return a->end == b->start && a->flags == b->flags && a->prot == b->prot;
}

/* Joins equal neighbours among the areas that touch [start, end]. */
static void join_around(uintptr_t start, uintptr_t end)
{
	unsigned long i = lower(start ? start - 1 : 0);

	while (i + 1 < nr_areas && areas[i].start <= end) {
		if (same_kind(&areas[i], &areas[i + 1])) {
			areas[i].end = areas[i + 1].end;
			delete(i + 1);
		} else {
			i++;
		}
	}
}

int area_add(uintptr_t start, uintptr_t end, unsigned flags, int prot)
{
	unsigned long gaps = 1;

	if (start >= end)
		return -EINVAL;
	/* Two splits, and a gap before each area there is and one behind the last. */
	for (unsigned long i = lower(start); i < nr_areas && areas[i].start < end; i++)
		gaps++;
	if (make_room(2 + gaps) || (mergeable(flags) && page_reserve(start >> PAGE_SHIFT, end >> PAGE_SHIFT)))
		return -ENOMEM;
	split_at(start);
	split_at(end);
	/* What is an area already keeps what it has and gains `flags`; the gaps become new areas. */
	for (uintptr_t at = start; at < end;) {
		unsigned long i = lower(at);

		if (i < nr_areas && areas[i].start <= at) {
			areas[i].flags |= flags;
			if (flags & AREA_ADVISED)
				areas[i].flags &= ~AREA_UNMERGED;
			areas[i].prot = prot;
			at = areas[i].end;
		} else {
			uintptr_t stop = i < nr_areas ? min_addr(areas[i].start, end) : end;

			insert(i, (struct area){.start = at, .end = stop, .flags = flags, .prot = prot});
			at = stop;
		}
	}
	join_around(start, end);
	areas_seq += mergeable(flags);
	return 0;
}

void area_change(uintptr_t start, uintptr_t end, unsigned set, unsigned clear, int prot)
{
	unsigned long i;

	if (!area_overlaps(start, end))
		return;
	if (make_room(2)) {
		/* No memory for the two pieces: give the whole areas the stricter reading, which merges less. */
		for (i = lower(start); i < nr_areas && areas[i].start < end; i++) {
			areas[i].flags |= AREA_EXCLUDED;
			areas_seq++;
		}
		return;
	}
	scan_disturb(); /* what was not to be looked at may be now */
	split_at(start);
	split_at(end);
	for (i = lower(start); i < nr_areas && areas[i].start < end; i++) {
		unsigned flags = (areas[i].flags & ~clear) | set;

		areas_seq += mergeable(flags) != mergeable(areas[i].flags);
		areas[i].flags = flags;
		if (prot >= 0)
			areas[i].prot = prot;
	}
	join_around(start, end);
}

void area_remove(uintptr_t start, uintptr_t end)
{
	unsigned long i;

	if (!area_overlaps(start, end))
		return;
	/* What is unmapped is mapped from no segment. KNOWN stays: the service hears that the pages are gone
	 * should the range become an area again before it asks. */
	page_set(PAGE_SEGMENT, start >> PAGE_SHIFT, end >> PAGE_SHIFT, false);
	page_set(PAGE_ISLAND, start >> PAGE_SHIFT, end >> PAGE_SHIFT, false);
	if (make_room(2)) {
		/* No hole can be cut. What lies around it may be mapped from segments, and a discard has to find that out. */
		for (i = lower(start); i < nr_areas && areas[i].start < end; i++) {
			areas_seq += mergeable(areas[i].flags);
			areas[i].flags |= AREA_EXCLUDED;
		}
		return;
	}
	split_at(start);
	split_at(end);
	for (i = lower(start); i < nr_areas && areas[i].start < end;) {
		areas_seq += mergeable(areas[i].flags);
		delete(i);
	}
}

void area_forget_plain(uintptr_t start, uintptr_t end)
{
	for (unsigned long i = lower(start); i < nr_areas && areas[i].start < end;) {
		const struct area *a = &areas[i];
		uint64_t last = a->end >> PAGE_SHIFT;

		/* Locks and exclusions outlive the advice. Islands stay: their mapping is still a segment's, and a discard has to know. */
		if (!(a->flags & (AREA_ALLOC | AREA_ADVISED | AREA_MAPPED | AREA_LOCKED | AREA_EXCLUDED)) &&
		    page_next(PAGE_SEGMENT, a->start >> PAGE_SHIFT, last, true) == last) {
			delete(i);
			areas_seq++;
		} else {
			i++;
		}
	}
}

void area_move(uintptr_t old_start, uintptr_t old_end, uintptr_t new_start)
{
	uintptr_t at = old_start;

	area_remove(new_start, new_start + (old_end - old_start));
	while (at < old_end) {
		struct area *a = area_next(at);
		struct area copy;
		uintptr_t from, to;

		if (!a || a->start >= old_end)
			break;
		copy = *a;
		from = copy.start > at ? copy.start : at;
		to = min_addr(copy.end, old_end);
		page_reserve((new_start + from - old_start) >> PAGE_SHIFT, (new_start + to - old_start) >> PAGE_SHIFT);
		area_add(new_start + (from - old_start), new_start + (to - old_start), copy.flags, copy.prot);
		at = to;
	}
	page_move(old_start >> PAGE_SHIFT, old_end >> PAGE_SHIFT, new_start >> PAGE_SHIFT);
	area_remove(old_start, old_end);
}

/* ---- mappings inside areas ------------------------------------------------------------------------ */

void area_readvise(const struct area *a, uintptr_t start, uintptr_t end)
{
	static const struct {
		unsigned flag;
		int advice;
	} advices[] = {
		{AREA_DONTFORK, MADV_DONTFORK},
		{AREA_DONTDUMP, MADV_DONTDUMP},
		{AREA_HUGEPAGE, MADV_HUGEPAGE},
		{AREA_NOHUGEPAGE, MADV_NOHUGEPAGE},
	};

	for (size_t i = 0; i < sizeof(advices) / sizeof(advices[0]); i++)
		if (a->flags & advices[i].flag)
			real.madvise((void *)start, end - start, advices[i].advice);
}

int discard_segments(uintptr_t start, uintptr_t end)
{
	uint64_t last = end >> PAGE_SHIFT;

	scan_disturb();
	for (uint64_t at = start >> PAGE_SHIFT; at < last;) {
		uint64_t vpn = page_next(PAGE_SEGMENT, at, last, true);
		const struct area *a = area_next(vpn << PAGE_SHIFT);
		uintptr_t from = vpn << PAGE_SHIFT, to;

		if (vpn >= last || !a)
			break;
		to = min_addr(page_next(PAGE_SEGMENT, vpn, last, false) << PAGE_SHIFT, a->end);
		if (real.mmap((void *)from, to - from, a->prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
		    MAP_FAILED)
			return -errno;
		area_readvise(a, from, to);
		page_set(PAGE_SEGMENT, vpn, to >> PAGE_SHIFT, false);
		page_set(PAGE_ISLAND, vpn, to >> PAGE_SHIFT, false);
		at = to >> PAGE_SHIFT;
	}
	return 0;
}
