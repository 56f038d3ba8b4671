/* SPDX-License-Identifier: Apache-2.0 */
/* A look at everything, step by step: which areas are looked at (look.c), and of which it is known that nothing is new. */
#include "pages/scan.h"
#include "base/area.h"
#include "base/lock.h"
#include "base/maps.h"
#include "base/planes.h"
#include "kernel/kernel.h"
#include "pages/pages.h"

#include <sys/resource.h>

#define WALK_PAGES (1UL << 20) /* walked under one hold of the lock: 4 GiB, some 2 ms if nothing changed */
#define PASS_OVER 256	       /* areas, under one hold of the lock */
#define SMALL_STEPS 32

/* Makes all of an area count as written: we may have looked at some of it before, and nobody else knows what we saw. */
static const struct area *look_afresh(const struct area *a, uint64_t vpn)
{
	uintptr_t start = a->start, end = a->end;

	if (kernel.tracking)
		untrack(start, end);
	area_change(start, end, 0, AREA_AFRESH, -1);
	return area_next(vpn << PAGE_SHIFT);
}

/* The first area that ends after `addr` and is to be looked at, or one before it: no more are passed over than one hold of
 * the lock is for. */
static const struct area *next_area(const struct out *o, uintptr_t addr)
{
	const struct area *a = area_next(addr);

	for (int i = 0; a && o->flags & SP_SCAN_NAMED && !area_named(a) && i < PASS_OVER; i++)
		a = area_next(a->end);
	return a;
}

/*
 * Pages that were looked at are write-protected, so a write to them faults, and the kernel counts the faults of a
 * process (getrusage(2)). As long as the count is the same as when the last look at everything began, there is nothing
 * new, and no need to walk page tables. What others write into the process (ptrace(2), process_vm_writev(2)) faults
 * there, and is found when the service asks for a look without SP_SCAN_STILL.
 */
static struct {
	bool whole;    /* the look covers everything from the first page on; nothing was left out so far */
	bool again;    /* all that it looks at was looked at before, so what is new was written */
	unsigned many; /* such looks in a row */
	uint64_t next; /* where it goes on; 0: it has come to the end */
	uint64_t areas_seq;
	long faults; /* the count when the look began */
} last_look;

#define AGAIN_MAX                                                                                                      \
	15 /* then every mapping is asked for once, since the program may have made it by an inline system call */

/* Whether a small area has nothing for this look but what was written. */
static bool only_writes_count(const struct out *o, const struct area *a)
{
	uint64_t vpn = a->start >> PAGE_SHIFT, end = a->end >> PAGE_SHIFT;

	if (end - vpn > SMALL_PAGES || !area_mergeable(a) || a->flags & (AREA_AFRESH | AREA_LOCKED) ||
	    !(a->prot & PROT_READ))
		return false;
	if (page_next(PAGE_SEGMENT, vpn, end, true) == end)
		return page_next(PAGE_KNOWN, vpn, end, true) == end;
	return o->flags & SP_SCAN_STILL && page_next(PAGE_SEGMENT, vpn, end, false) == end &&
	       page_next(PAGE_KNOWN, vpn, end, false) == end && page_next(PAGE_ISLAND, vpn, end, true) == end;
}

/* Looks at the small areas of a region of written pages. Returns how far it came. */
static uint64_t look_at_small(struct out *o, const struct page_region *r)
{
	uint64_t at = r->start >> PAGE_SHIFT, end = r->end >> PAGE_SHIFT;

	while (at < end) {
		const struct area *a = area_next(at << PAGE_SHIFT);
		uint64_t stop;

		if (!a || a->start >> PAGE_SHIFT >= end)
			break;
		if (full(o))
			return at;
		if (at < a->start >> PAGE_SHIFT)
			at = a->start >> PAGE_SHIFT;
		stop = min_addr(a->end >> PAGE_SHIFT, end);
		if (area_mergeable(a) && !page_test(PAGE_SEGMENT, at)) {
			uint64_t next = look_at_anonymous(o, a, at, stop);

			if (next < stop)
				return next;
		}
		at = stop;
	}
	return end;
}

/* If only what was written counts of `a` and of areas that follow it, looks at all of them with one walk. Returns where to go
 * on; or `vpn`: it does not, or the answer is full. */
static uint64_t look_at_written(struct out *o, const struct area *a, uint64_t vpn, uint64_t last)
{
	const struct pm_walk written = {.must = PAGE_IS_PRESENT | PAGE_IS_WRITTEN | PAGE_IS_WPALLOWED,
					.must_not = PAGE_IS_PFNZERO};
	struct page_region v[NR_REGIONS];
	uint32_t before = o->nsums;
	uintptr_t end = 0, walked;
	int n, i = 0;

	if (!last_look.again || areas_seq != last_look.areas_seq || atomic_load(&pages_disturbed))
		return vpn;
	for (; a && a->end >> PAGE_SHIFT <= last && i < PASS_OVER && only_writes_count(o, a); i++, a = area_next(end))
		end = a->end;
	if (i < 2)
		return vpn;
	n = pagemap_walk(vpn << PAGE_SHIFT, end, &written, v, NR_REGIONS, &walked);
	if (n < 0)
		return vpn;
	for (i = 0; i < n; i++) {
		uint64_t next = look_at_small(o, &v[i]);

		if (next < v[i].end >> PAGE_SHIFT || o->nsums - before >= STEP_PAGES)
			return next;
	}
	return walked >> PAGE_SHIFT;
}

/* Looks at pages before `last`, for one hold of the lock. Returns where to go on; 0: there is no area after this. */
static uint64_t step(struct out *o, uint64_t vpn, uint64_t last)
{
	const struct area *a = next_area(o, vpn << PAGE_SHIFT);
	uint64_t end;
	bool segment;

	if (!a)
		return 0;
	end = look_at_written(o, a, vpn, last);
	if (end > vpn)
		return end;
	if (o->flags & SP_SCAN_NAMED && !area_named(a))
		return a->end >> PAGE_SHIFT;
	if (a->flags & AREA_AFRESH && area_mergeable(a))
		a = look_afresh(a, vpn);
	end = a->end >> PAGE_SHIFT;
	if (!area_mergeable(a)) /* not in the service's list of areas; the service has forgotten what was there */
		return end;
	if (vpn < a->start >> PAGE_SHIFT)
		vpn = a->start >> PAGE_SHIFT;
	if (vpn >= last)
		return vpn;
	if (end > last)
		end = last;
	if (end - vpn > WALK_PAGES)
		end = vpn + WALK_PAGES;
	segment = page_test(PAGE_SEGMENT, vpn);
	end = page_next(PAGE_SEGMENT, vpn, end, !segment);
	o->small = end - vpn <= SMALL_PAGES;
	return segment ? look_at_segment(o, a, vpn, end) : look_at_anonymous(o, a, vpn, end);
}

/* A step; or several, if they are small, for taking the lock costs as much as one of these. */
static uint64_t steps(struct out *o, uint64_t vpn, uint64_t last)
{
	for (int i = 0; i < SMALL_STEPS; i++) {
		uint64_t from = vpn;

		o->small = false;
		vpn = step(o, vpn, last);
		if (vpn && vpn <= from && from < last && !full(o)) /* the kernel did not look at the page, and did not
								    * say why */
			vpn = from + 1;
		if (!vpn || vpn >= last || full(o) || !o->small || mmap_lock_contended())
			break;
	}
	return vpn;
}

/* Returns -1 if the kernel does not tell. */
static long count_faults(void)
{
	struct rusage used;

	return getrusage(RUSAGE_SELF, &used) ? -1 : used.ru_minflt + used.ru_majflt;
}

/* Notes what a request looks at. True: it looks at everything, and would find nothing new. Needs the lock. */
static bool nothing_new(const struct sp_scan *req)
{
	long faults;
	bool again;

	if (req->vpn) {
		last_look.whole &= req->vpn == last_look.next && req->end >= SP_VPN_END;
		return false;
	}
	faults = count_faults();
	again = last_look.whole && !last_look.next && areas_seq == last_look.areas_seq &&
		!atomic_load(&pages_disturbed);
	if (again && req->flags & SP_SCAN_STILL && faults == last_look.faults)
		return true;
	last_look.again = again && kernel.tracking && kernel.scan && !(req->flags & (SP_SCAN_ALL | SP_SCAN_NAMED)) &&
			  last_look.many < AGAIN_MAX;
	last_look.many = last_look.again ? last_look.many + 1 : 0;
	atomic_store(&pages_disturbed, false);
	last_look.whole = kernel.tracking && faults >= 0 && req->end >= SP_VPN_END && !(req->flags & SP_SCAN_NAMED);
	last_look.areas_seq = areas_seq;
	last_look.faults = faults;
	return false;
}

void scan_step(const struct sp_scan *req, struct sp_scanned *head, struct sp_run *runs, uint32_t max_runs,
	       uint64_t *sums, uint32_t max_sums)
{
	struct out o = {.runs = runs, .sums = sums, .max_runs = max_runs, .max_sums = max_sums, .flags = req->flags};
	uint64_t vpn = req->vpn;
	bool nothing;

	if (req->budget < max_sums)
		o.max_sums = (uint32_t)req->budget;
	agent_mmap_lock();
	*head = (struct sp_scanned){.areas_seq = areas_seq};
	nothing = nothing_new(req);
	agent_mmap_unlock();
	if (nothing)
		return;
	do {
		agent_mmap_lock();
		vma_resume();
		vpn = steps(&o, vpn, req->end);
		/* The first finds may lie in no area any more; the service must not take that for a lie. */
		if (areas_seq != head->areas_seq)
			head->areas_seq = SP_AREAS_CHANGED;
		agent_mmap_unlock();
	} while (vpn && vpn < req->end && !full(&o));
	last_look.next = head->next_vpn = vpn;
	head->nruns = o.nruns;
	head->nhashed = o.nsums;
}