/* SPDX-License-Identifier: Apache-2.0 */
/* Areas: whose memory the agent may touch. */
#include "base/area.h"
#include "base/planes.h"

#include <sys/mman.h>

static struct area_set areas;
_Atomic unsigned long nr_areas;
uint64_t areas_seq = 1;
_Atomic bool blocks_changed;

_Atomic bool merge_any, merge_mapped, small_allocs;
bool kernel_serves_others;

static _Atomic bool lock_future; /* mlockall(MCL_FUTURE) */

bool merges_mapped(void)
{
	return merge_any || merge_mapped;
}

static bool mergeable(unsigned flags)
{
	bool mapped = merges_mapped() && (flags & (AREA_MAPPED | AREA_RESERVED | AREA_UNPINNED)) == AREA_MAPPED;

	return (flags & (AREA_ALLOC | AREA_ADVISED) || mapped) && !(flags & (AREA_EXCLUDED | AREA_UNMERGED));
}

/* `now`, with AREA_AFRESH if the area becomes mergeable. */
static unsigned changed_flags(unsigned before, unsigned now)
{
	return !mergeable(before) && mergeable(now) ? now | AREA_AFRESH : now;
}

bool area_mergeable(const struct area *a)
{
	return mergeable(a->flags);
}

bool area_named(const struct area *a)
{
	return merge_any || !merge_mapped || a->flags & AREA_ADVISED || (a->flags & AREA_ALLOC && !small_allocs);
}

struct area *area_next(uintptr_t addr)
{
	return area_set_next(&areas, addr);
}

bool area_overlaps(uintptr_t start, uintptr_t end)
{
	const struct area *a = start < end ? area_next(start) : NULL;

	return a && a->start < end;
}

bool any_mergeable(void)
{
	for (const struct area *a = area_next(0); a; a = area_next(a->end))
		if (mergeable(a->flags))
			return true;
	return false;
}

int area_reserve(unsigned long more)
{
	return area_set_reserve(&areas, more);
}

void area_trim(void)
{
	area_set_trim(&areas);
}

unsigned long area_count(uintptr_t start, uintptr_t end)
{
	unsigned long n = 0;

	for (const struct area *a = area_next(start); a && a->start < end; a = area_next(a->end))
		n++;
	return n;
}

static void insert(struct area a)
{
	area_set_insert(&areas, a);
	nr_areas = areas.nr;
}

static void delete(struct area *a)
{
	area_set_delete(&areas, a);
	nr_areas = areas.nr;
}

bool is_plain_block(const struct area *a)
{
	const unsigned allowed = AREA_ALLOC | AREA_HUGEPAGE | AREA_NOHUGEPAGE | area_new_flags();

	return a->flags & AREA_ALLOC && !(a->flags & ~allowed) && a->prot == (PROT_READ | PROT_WRITE);
}

/* Makes `addr` a boundary between areas if it lies inside one. Needs room for one more area. */
static void split_at(uintptr_t addr)
{
	struct area *a = area_next(addr);

	if (a && a->start < addr) {
		struct area right = *a;

		right.start = a->end = addr;
		insert(right);
	}
}

static bool same_kind(const struct area *a, const struct area *b)
{
	return a->end == b->start && a->flags == b->flags && a->prot == b->prot;
}

/* Joins neighbours of the same kind among the areas that touch [start, end]. */
static void join_around(uintptr_t start, uintptr_t end)
{
	struct area *a = area_next(start ? start - 1 : 0), *b;

	while (a && a->start <= end && (b = area_next(a->end))) {
		if (same_kind(a, b)) {
			uintptr_t stop = b->end;

			delete(b); /* first, since no two may overlap */
			a->end = stop;
		} else {
			a = b;
		}
	}
}

int area_add(uintptr_t start, uintptr_t end, unsigned flags, int prot)
{
	if (start >= end)
		return -EINVAL;
	if (area_overlaps(start, end))
		return -EEXIST;
	if (end > ADDRESS_END) /* the planes do not reach there */
		flags |= AREA_EXCLUDED;
	if (area_reserve(1) || (mergeable(flags) && page_reserve(start >> PAGE_SHIFT, end >> PAGE_SHIFT)))
		return -ENOMEM;
	if (flags & AREA_ADVISED) /* the range may have been an area before */
		flags = changed_flags(0, flags);
	insert((struct area){.start = start, .end = end, .flags = flags, .prot = prot});
	join_around(start, end);
	areas_seq += mergeable(flags);
	if (mergeable(flags))
		page_tell_islands(start >> PAGE_SHIFT, end >> PAGE_SHIFT);
	return 0;
}

/* Called when there is no memory for the pieces: marks whole areas AREA_EXCLUDED, the stricter reading. They are not
 * merged, and the kernel is asked how they are protected (prot_of()). */
static void exclude(uintptr_t start, uintptr_t end)
{
	for (struct area *a = area_next(start); a && a->start < end; a = area_next(a->end)) {
		areas_seq += mergeable(a->flags);
		a->flags |= AREA_EXCLUDED;
		if (a->flags & AREA_ALLOC)
			blocks_changed = true;
	}
}

void area_change(uintptr_t start, uintptr_t end, unsigned set, unsigned clear, int prot)
{
	if (!area_overlaps(start, end))
		return;
	if (area_reserve(2)) {
		exclude(start, end);
		return;
	}
	page_disturb(); /* pages here may have to be looked at from now on */
	split_at(start);
	split_at(end);
	for (struct area *a = area_next(start); a && a->start < end; a = area_next(a->end)) {
		unsigned flags = changed_flags(a->flags, (a->flags & ~clear) | set);

		areas_seq += mergeable(flags) != mergeable(a->flags);
		a->flags = flags;
		if (prot >= 0)
			a->prot = prot;
		if (flags & AREA_ALLOC && !is_plain_block(a))
			blocks_changed = true;
	}
	join_around(start, end);
}

/* merge_any or merge_mapped has changed. `on`: what was an area before may be mergeable now. */
static void merging_changed(bool on)
{
	for (struct area *a = area_next(0); on && a; a = area_next(a->end))
		if (!mergeable(a->flags))
			continue;
		else if (page_reserve(a->start >> PAGE_SHIFT, a->end >> PAGE_SHIFT))
			a->flags |= AREA_EXCLUDED;
		else if (!(a->flags & (AREA_ALLOC | AREA_ADVISED)))
			a->flags |= AREA_AFRESH;
	join_around(0, ADDRESS_END);
	areas_seq++;
}

void area_merge_any(bool on)
{
	merge_any = on;
	merging_changed(on);
}

void area_merge_mapped(void)
{
	merge_mapped = true;
	merging_changed(true);
}

/* Cuts [start, end) out of `a`, which overlaps it. Needs room for one more area if two pieces are left. */
static void cut(struct area *a, uintptr_t start, uintptr_t end)
{
	struct area right = *a;

	if (a->start < start)
		a->end = min_addr(a->end, start);
	else if (a->end > end)
		a->start = end;
	else
		delete(a);
	if (right.start < start && right.end > end) {
		right.start = end;
		insert(right);
	}
}

void area_remove(uintptr_t start, uintptr_t end)
{
	struct area *a;

	if (!area_overlaps(start, end))
		return;
	/* Unmapped memory is mapped from no segment. KNOWN stays: if the range becomes an area again before the service
	 * asks, the service hears that the pages are gone. */
	page_set(PAGE_SEGMENT, start >> PAGE_SHIFT, end >> PAGE_SHIFT, false);
	page_set(PAGE_ISLAND, start >> PAGE_SHIFT, end >> PAGE_SHIFT, false);
	a = area_next(start);
	if (a->start < start && a->end > end && area_reserve(1)) {
		/* There is no memory to cut a hole. What lies around it may still be mapped from segments, and a
		 * discard has to know that. */
		exclude(start, end);
		return;
	}
	while ((a = area_next(start)) && a->start < end) {
		areas_seq += mergeable(a->flags);
		cut(a, start, end);
	}
}

void area_forget_plain(uintptr_t start, uintptr_t end)
{
	for (struct area *a; (a = area_next(start)) && a->start < end;) {
		uint64_t last = a->end >> PAGE_SHIFT;

		start = a->end;
		/* Locks and exclusions outlive the advice. Areas with islands stay: they are still mapped from a
		 * segment, and a discard has to know that. */
		if (!(a->flags & (AREA_ALLOC | AREA_ADVISED | AREA_MAPPED | AREA_LOCKED | AREA_EXCLUDED)) &&
		    page_next(PAGE_SEGMENT, a->start >> PAGE_SHIFT, last, true) == last) {
			delete(a);
			areas_seq++;
		}
	}
}

void area_copy(uintptr_t start, uintptr_t end, uintptr_t to)
{
	for (uintptr_t at = start; at < end;) {
		const struct area *a = area_next(at);
		uintptr_t from, stop;
		unsigned flags;

		if (!a || a->start >= end)
			return;
		from = a->start > at ? a->start : at;
		stop = min_addr(a->end, end);
		flags = a->flags;
		if (area_add(to + (from - start), to + (stop - start), flags, a->prot) == -ENOMEM)
			area_add(to + (from - start), to + (stop - start), flags | AREA_EXCLUDED, a->prot);
		at = stop;
	}
}

void area_move(uintptr_t old_start, uintptr_t old_end, uintptr_t new_start)
{
	area_remove(new_start, new_start + (old_end - old_start));
	area_copy(old_start, old_end, new_start);
	page_move(old_start >> PAGE_SHIFT, old_end >> PAGE_SHIFT, new_start >> PAGE_SHIFT);
	area_remove(old_start, old_end);
}

int area_cover(uintptr_t start, uintptr_t end, unsigned set, unsigned clear, int prot)
{
	uintptr_t stop;

	/* One for the gap before each area, one for the gap after the last, and two for splitting the first and the
	 * last area. */
	if (area_reserve(area_count(start, end) + 3)) {
		if (!(set & AREA_ADVISED)) /* memory that becomes locked or excluded must be left alone in any case */
			area_change(start, end, set, clear, -1);
		return -ENOMEM;
	}
	if (set & AREA_ADVISED && page_reserve(start >> PAGE_SHIFT, end >> PAGE_SHIFT))
		return -ENOMEM;
	for (uintptr_t at = start; at < end; at = stop) {
		const struct area *a = area_next(at);

		if (a && a->start <= at) {
			stop = min_addr(a->end, end);
			area_change(at, stop, set, clear, prot ? prot : -1);
		} else {
			stop = a ? min_addr(a->start, end) : end;
			area_add(at, stop, set | area_new_flags(), prot);
		}
	}
	return 0;
}

/* ---- locked in memory ------------------------------------------------------------------------------- */

unsigned area_new_flags(void)
{
	return lock_future ? AREA_LOCKED : 0;
}

void area_lock_future(bool on)
{
	lock_future = on;
}

void area_unlock(uintptr_t start, uintptr_t end)
{
	const struct area *a;

	area_change(start, end, 0, AREA_LOCKED, -1);
	/* An area may reach beyond the range on both sides: area_change() has joined the pieces that the lock had
	 * cut. */
	for (uintptr_t at = start, stop; at < end && (a = area_next(at)) && a->start < end; at = stop) {
		stop = min_addr(a->end, end);
		if (!a->flags) /* was an area only because it was locked */
			area_remove(a->start > start ? a->start : start, stop);
	}
}

void area_unlock_all(void)
{
	area_unlock(0, ADDRESS_END);
	lock_future = false;
}
