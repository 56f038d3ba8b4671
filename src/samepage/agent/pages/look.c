/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Looking at pages. In anonymous memory, pages written since the last look are hashed where they are. In memory mapped
 * from segments, the look finds pages that were written and got a private copy (islands), and pages that are merged
 * without the service knowing (after a fork, an mremap, or with a new service).
 */
#include "base/area.h"
#include "base/check.h"
#include "base/maps.h"
#include "base/planes.h"
#include "kernel/kernel.h"
#include "kernel/window.h"
#include "pages/pages.h"
#include "pages/scan.h"

#define PASS_FORKED (1UL << 16) /* pages that a fork still shares, under one hold of the lock: some 1 ms */

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

uint64_t look_at_anonymous(struct out *o, const struct area *a, uint64_t vpn, uint64_t end)
{
	const struct pm_walk written = {.must = PAGE_IS_WRITTEN, .max_pages = STEP_PAGES};
	uintptr_t start = vpn << PAGE_SHIFT, stop, walked;
	struct page_region v[NR_REGIONS];
	uint32_t before;
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
	/* First take the quick look at what was written, which usually is nothing at all. But where all pages before these
	 * were, so probably are the next; up to where a huge page may begin, no more than is looked at in one step. */
	if (start == o->dense)
		stop = min_addr(stop, (start | (WINDOW - 1)) + 1);
	v[0] = (struct page_region){start, walked = stop, 0};
	if (kernel.tracking && !(o->flags & SP_SCAN_ALL) && stop - start > SMALL_PAGES * PAGE_SIZE && start != o->dense)
		n = pagemap_walk(start, stop, &written, v, NR_REGIONS, &walked);
	/* The walk may have stopped in the middle of a huge page. */
	if (n > 0 && v[n - 1].end == walked)
		v[n - 1].end = walked = min_addr((walked + WINDOW - 1) & ~(WINDOW - 1), stop);
	before = o->nsums;
	if (!look_at_regions(o, v, n, &walked))
		return walked >> PAGE_SHIFT;
	o->dense = walked > start && o->nsums - before == (walked - start) >> PAGE_SHIFT ? walked : 0;
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

uint64_t look_at_segment(struct out *o, const struct area *a, uint64_t vpn, uint64_t end)
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
