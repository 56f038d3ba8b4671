/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Looking at pages. In anonymous memory, pages written since the last look are hashed where they are. In memory mapped
 * from segments, the look finds pages that were written and got a private copy (islands), and pages that are merged
 * without the service knowing (after a fork, an mremap, or with a new service).
 */
#include "base/area.h"
#include "base/check.h"
#include "base/lock.h"
#include "base/maps.h"
#include "base/planes.h"
#include "kernel/kernel.h"
#include "kernel/window.h"
#include "pages/pages.h"

#include <linux/userfaultfd.h>
#include <sys/resource.h>

#define STEP_PAGES 512UL       /* hashed under one hold of the lock, or up to twice as many: 2 MiB, some 200 us */
#define WALK_PAGES (1UL << 20) /* walked under one hold of the lock: 4 GiB, some 2 ms if nothing changed */
#define NR_REGIONS 64
#define PASS_OVER 256		/* areas, under one hold of the lock */
#define PASS_FORKED (1UL << 16) /* pages that a fork still shares, under one hold of the lock: some 1 ms */

struct out {
	struct sp_run *runs;
	uint64_t *sums;
	uint32_t nruns, max_runs, nsums, max_sums;
	uint32_t flags; /* enum sp_scan_flags */
};

static bool full(const struct out *o)
{
	return o->nruns == o->max_runs || o->nsums == o->max_sums;
}

static void emit(struct out *o, uint64_t vpn, uint64_t end, uint32_t kind, uint64_t ino, uint64_t offset)
{
	struct sp_run *last = o->nruns ? &o->runs[o->nruns - 1] : NULL;

	if (last && last->kind == kind && last->vpn + last->npages == vpn && last->ino == ino &&
	    (!ino || last->offset + last->npages == offset)) {
		last->npages += (uint32_t)(end - vpn);
		return;
	}
	VM_BUG_ON(o->nruns == o->max_runs);
	o->runs[o->nruns++] = (struct sp_run){vpn, (uint32_t)(end - vpn), kind, ino, offset};
}

enum { RUN_HASHED, RUN_BROKEN, RUN_GONE, RUN_FOUND }; /* RunKind in samepage/memory */

/* Makes nodes part of the checksums of n pages. False: the kernel does not say on which nodes they are. */
static bool mix_nodes(uint64_t *sums, uint64_t vpn, size_t n)
{
	const uint64_t zero = page_checksum(zero_page);
	int node[SECTION_MAX];

	if (page_nodes(vpn << PAGE_SHIFT, n, node))
		return false;
	for (size_t i = 0; i < n; i++)
		if (sums[i] != zero && node[i] > 0)
			sums[i] ^= (uint64_t)node[i] * 0x9e3779b97f4a7c15u;
	return true;
}

/* Hashes one region of at most STEP_PAGES, as far as there is room for checksums. Returns where it stopped. */
static uint64_t hash_region(struct out *o, const struct page_region *r)
{
	uint64_t vpn = r->start >> PAGE_SHIFT, end = r->end >> PAGE_SHIFT;
	uint64_t *sums = o->sums + o->nsums;

	VM_BUG_ON(end - vpn > SECTION_MAX);
	if (end - vpn > o->max_sums - o->nsums)
		end = vpn + (o->max_sums - o->nsums);
	if (vpn == end)
		return vpn;
	for (uint64_t p = vpn; p < end; p++)
		sums[p - vpn] = page_checksum((const void *)(p << PAGE_SHIFT));
	if (o->flags & SP_SCAN_NODES && !mix_nodes(sums, vpn, end - vpn))
		return end; /* without nodes, these pages might be merged across nodes, so don't report them at all */
	o->nsums += (uint32_t)(end - vpn);
	emit(o, vpn, end, RUN_HASHED, 0, 0);
	return end;
}

/*
 * Where to end a look at the regions found in [start, walked) so that it ends inside no huge page: write-protecting a
 * part of one would split it. Returns `start` if that leaves nothing to look at, for the answer is full then. But if
 * the answer is still empty, returns the partial huge page anyway.
 */
static uintptr_t whole_pages(const struct out *o, const struct page_region *v, int n, uintptr_t start, uintptr_t walked)
{
	const struct page_region *last = &v[n - 1];
	uintptr_t cut;

	if (!(last->categories & PAGE_IS_HUGE) || last->end != walked || walked % WINDOW == 0)
		return walked;
	cut = walked & ~(WINDOW - 1);
	if (cut > last->start)
		return cut;
	return last->start > start || o->nsums ? last->start : walked;
}

static atomic_bool forks_share; /* pages may be shared with a parent or a child */

void scan_forked(void)
{
	atomic_store(&forks_share, true);
}

/* Pages that are still shared by fork can be swapped for no others, and sharing them once more would save nothing. So
 * they are not looked at, and go on to count as written: when they are ours alone, the next look finds them.
 * Returns where pages end that are all shared, or all not, as *forked says. */
static uintptr_t same_kind(uintptr_t start, uintptr_t end, bool *forked)
{
	size_t n = (end - start) / PAGE_SIZE, i = 1;
	uint8_t kind[SECTION_MAX];

	*forked = false;
	if (n > SECTION_MAX)
		n = SECTION_MAX;
	if (!atomic_load(&forks_share) || page_kinds(start, n, kind))
		return end;
	*forked = kind[0] == PAGE_FORKED;
	while (i < n && (kind[i] == PAGE_FORKED) == *forked)
		i++;
	return i < n || *forked ? start + i * PAGE_SIZE : end;
}

/* Hashes pages of anonymous memory [start, end), at most STEP_PAGES, and follows writes to them from now on. Returns
 * how far it came. */
static uintptr_t look_at(struct out *o, uintptr_t start, uintptr_t end)
{
	struct pm_walk w = {
		.must = PAGE_IS_PRESENT | (kernel.tracking && !(o->flags & SP_SCAN_ALL) ? PAGE_IS_WRITTEN : 0),
		.must_not =
			PAGE_IS_SWAPPED | (kernel.scan ? PAGE_IS_PFNZERO : 0) | (kernel.tracking ? 0 : PAGE_IS_FILE),
		.max_pages = o->max_sums - o->nsums < STEP_PAGES ? o->max_sums - o->nsums : STEP_PAGES,
	};
	int room = (int)(o->max_runs - o->nruns < NR_REGIONS ? o->max_runs - o->nruns : NR_REGIONS), n = 1;
	struct page_region v[NR_REGIONS];
	uintptr_t walked;

	if (!kernel.tracking || end - start > w.max_pages * PAGE_SIZE) { /* if it is shorter, no huge page is cut */
		n = pagemap_walk(start, end, &w, v, room, &walked);
		if (n > 0 && kernel.tracking) {
			end = whole_pages(o, v, n, start, walked);
			if (end == start) {
				o->max_sums = o->nsums; /* full */
				return start;
			}
		}
	}
	if (n > 0 && kernel.tracking) {
		w.must_not |= PAGE_IS_FILE; /* expensive, and not needed to see how far to go */
		w.protect = true;
		n = pagemap_walk(start, end, &w, v, room, &walked);
	}
	if (n < 0)
		return end;
	for (int i = 0; i < n; i++)
		hash_region(o, &v[i]);
	return walked;
}

/* The same in several regions, for one hold of the lock. False: it did not come through; *walked is where it stopped. */
static bool look_at_regions(struct out *o, const struct page_region *v, int n, uintptr_t *walked)
{
	uint32_t before = o->nsums;
	size_t passed = 0;
	bool forked;

	for (int i = 0; i < n; i++)
		for (uintptr_t at = v[i].start, next; at < v[i].end; at = next) {
			bool enough = full(o) || o->nsums - before >= STEP_PAGES || passed >= PASS_FORKED;

			next = enough ? at : same_kind(at, v[i].end, &forked);
			if (!enough && forked)
				passed += (next - at) / PAGE_SIZE;
			else if (!enough)
				next = look_at(o, at, next);
			if (next == at) {
				*walked = at;
				return false;
			}
		}
	return true;
}

static uint64_t scan_anonymous(struct out *o, const struct area *a, uint64_t vpn, uint64_t end)
{
	const struct pm_walk written = {.must = PAGE_IS_WRITTEN, .max_pages = STEP_PAGES};
	uintptr_t start = vpn << PAGE_SHIFT, stop, walked;
	struct page_region v[NR_REGIONS];
	struct vma vma;
	int n = 1;

	/* A page that was merged and is anonymous now was discarded, unmerged or mapped anew by the application. Report
	 * that first, and then, in the same look, what is there instead. */
	if (page_test(PAGE_KNOWN, vpn)) {
		end = page_next(PAGE_KNOWN, vpn, end, false);
		page_set(PAGE_KNOWN, vpn, end, false);
		emit(o, vpn, end, RUN_GONE, 0, 0);
	} else {
		end = page_next(PAGE_KNOWN, vpn, end, true);
	}
	if ((a->flags & AREA_LOCKED) || !(a->prot & PROT_READ))
		return end;
	stop = end << PAGE_SHIFT;
	/* An application that changes an area behind the wrappers' back must not be able to make us fault. */
	if (!vma_find(kernel.maps, start, &vma) || vma.start >= stop)
		return end;
	if (vma.start > start)
		return vma.start >> PAGE_SHIFT;
	stop = min_addr(stop, vma.end);
	if (!vma.read || vma.shared || vma.ino) { /* it did that, and may do so again */
		area_change(start, stop, AREA_EXCLUDED, 0, -1);
		return stop >> PAGE_SHIFT;
	}
	track(start, stop);
	/* First take the quick look at what was written, which usually is nothing at all. */
	v[0] = (struct page_region){start, walked = stop, 0};
	if (kernel.tracking && !(o->flags & SP_SCAN_ALL))
		n = pagemap_walk(start, stop, &written, v, NR_REGIONS, &walked);
	/* The walk may have stopped in the middle of a huge page. */
	if (n > 0 && v[n - 1].end == walked)
		v[n - 1].end = walked = min_addr((walked + WINDOW - 1) & ~(WINDOW - 1), stop);
	if (!look_at_regions(o, v, n, &walked))
		return walked >> PAGE_SHIFT;
	return (n < 0 ? stop : walked) >> PAGE_SHIFT;
}

/* Marks private copies in [vpn, end) of a segment mapping as islands. Returns how far it came. */
static uint64_t mark_islands(uint64_t vpn, uint64_t end)
{
	const struct pm_walk w = {.any = PAGE_IS_PRESENT | PAGE_IS_SWAPPED, .must_not = PAGE_IS_FILE};
	struct page_region v[NR_REGIONS];
	uintptr_t walked;
	int n = pagemap_walk(vpn << PAGE_SHIFT, end << PAGE_SHIFT, &w, v, NR_REGIONS, &walked);

	for (int i = 0; i < n; i++)
		page_set(PAGE_ISLAND, v[i].start >> PAGE_SHIFT, v[i].end >> PAGE_SHIFT, true);
	return n < 0 ? end : walked >> PAGE_SHIFT;
}

/* Reports merged pages of [vpn, end) that the service does not know of. A forked child has them without a page table
 * entry until it touches them. */
static void report_found(struct out *o, uint64_t vpn, uint64_t end)
{
	while (vpn < end && o->nruns < o->max_runs) {
		uintptr_t start = vpn << PAGE_SHIFT;
		struct vma vma;
		uint64_t stop;

		if (!vma_find(kernel.maps, start, &vma) || vma.start > start || !vma.ino || vma.shared)
			return;
		stop = min_addr(end, vma.end >> PAGE_SHIFT);
		page_set(PAGE_KNOWN, vpn, stop, true);
		emit(o, vpn, stop, RUN_FOUND, vma.ino, (vma.offset + (start - vma.start)) >> PAGE_SHIFT);
		vpn = stop;
	}
}

static uint64_t scan_segment(struct out *o, const struct area *a, uint64_t vpn, uint64_t end)
{
	/* Only write-protection can swap an island again; then it is looked at like any other memory. */
	bool hash_islands = kernel.protects && (a->prot & PROT_READ);

	if (!(o->flags & SP_SCAN_STILL))
		end = mark_islands(vpn, end);
	while (vpn < end && !full(o)) {
		bool island = page_test(PAGE_ISLAND, vpn), known = page_test(PAGE_KNOWN, vpn);
		uint64_t stop = page_next(PAGE_ISLAND, vpn, end, !island);

		stop = page_next(PAGE_KNOWN, vpn, stop, !known);
		if (island && hash_islands) {
			struct page_region r = {vpn << PAGE_SHIFT, min_addr(stop, vpn + STEP_PAGES) << PAGE_SHIFT, 0};

			stop = hash_region(o, &r);
			page_set(PAGE_KNOWN, vpn, stop, false);
			return stop;
		}
		if (island && known) {
			page_set(PAGE_KNOWN, vpn, stop, false);
			emit(o, vpn, stop, RUN_BROKEN, 0, 0);
		} else if (!island && !known) {
			report_found(o, vpn, stop);
		}
		vpn = stop;
	}
	return vpn;
}

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

/* Looks at pages before `last`, for one hold of the lock. Returns where to go on; 0: there is no area after this. */
static uint64_t step(struct out *o, uint64_t vpn, uint64_t last)
{
	const struct area *a = next_area(o, vpn << PAGE_SHIFT);
	uint64_t end;
	bool segment;

	if (!a)
		return 0;
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
	return segment ? scan_segment(o, a, vpn, end) : scan_anonymous(o, a, vpn, end);
}

/*
 * Pages that were looked at are write-protected, so a write to them faults, and the kernel counts the faults of a
 * process (getrusage(2)). As long as the count is the same as when the last look at everything began, there is nothing
 * new, and no need to walk page tables. What others write into the process (ptrace(2), process_vm_writev(2)) faults
 * there, and is found when the service asks for a look without SP_SCAN_STILL.
 */
static struct {
	bool whole;    /* the look covers everything from the first page on; nothing was left out so far */
	uint64_t next; /* where it goes on; 0: it has come to the end */
	uint64_t areas_seq;
	long faults; /* the count when the look began */
} last_look;

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

	if (req->vpn) {
		last_look.whole &= req->vpn == last_look.next && req->end >= SP_VPN_END;
		return false;
	}
	faults = count_faults();
	if (req->flags & SP_SCAN_STILL && last_look.whole && !last_look.next && faults == last_look.faults &&
	    areas_seq == last_look.areas_seq && !atomic_load(&pages_disturbed))
		return true;
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
		uint64_t from = vpn;

		agent_mmap_lock();
		vma_resume();
		vpn = step(&o, vpn, req->end);
		if (vpn && vpn <= from && from < req->end && !full(&o)) /* the kernel did not look at the page, and did
									 * not say why */
			vpn = from + 1;
		/* The first finds may lie in no area any more; the service must not take that for a lie. */
		if (areas_seq != head->areas_seq)
			head->areas_seq = SP_AREAS_CHANGED;
		agent_mmap_unlock();
	} while (vpn && vpn < req->end && !full(&o));
	last_look.next = head->next_vpn = vpn;
	head->nruns = o.nruns;
	head->nhashed = o.nsums;
}
