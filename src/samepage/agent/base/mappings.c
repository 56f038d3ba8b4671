/* SPDX-License-Identifier: Apache-2.0 */
/* The mappings in areas: giving them up, and asking the kernel about them. */
#include "base/area.h"
#include "base/maps.h"
#include "base/planes.h"
#include "base/real.h"

#include <sys/mman.h>

bool has_segments(uintptr_t start, uintptr_t end)
{
	uint64_t last = end >> PAGE_SHIFT;

	return start < end && page_next(PAGE_SEGMENT, start >> PAGE_SHIFT, last, true) < last;
}

void area_readvise(const struct area *a, uintptr_t start, uintptr_t end)
{
	static const struct {
		unsigned flag;
		int advice;
	} advices[] = {
		{AREA_DONTFORK, MADV_DONTFORK},	    {AREA_DONTDUMP, MADV_DONTDUMP}, {AREA_HUGEPAGE, MADV_HUGEPAGE},
		{AREA_NOHUGEPAGE, MADV_NOHUGEPAGE}, {AREA_WIPE, MADV_WIPEONFORK},   {AREA_SEQUENTIAL, MADV_SEQUENTIAL},
		{AREA_RANDOM, MADV_RANDOM},
	};

	for (size_t i = 0; i < sizeof(advices) / sizeof(advices[0]); i++)
		if (a->flags & advices[i].flag)
			real.madvise((void *)start, end - start, advices[i].advice);
	/* Under mlockall(MCL_FUTURE) every new mapping is locked. This area was unlocked since, so its new mapping must
	 * be, too. */
	if (area_new_flags() & ~a->flags & AREA_LOCKED)
		real.munlock((void *)start, end - start);
}

/* How the memory at `addr` is protected. */
static int prot_of(const struct area *a, uintptr_t addr)
{
	int prot = a->prot, maps = a->flags & AREA_EXCLUDED ? maps_open() : -1;
	struct vma v;

	if (maps < 0)
		return prot;
	if (vma_find(maps, addr, &v) && v.start <= addr)
		prot = vma_prot(&v);
	maps_close(maps);
	return prot;
}

int discard_segments(uintptr_t start, uintptr_t end)
{
	uint64_t last = end >> PAGE_SHIFT;

	page_disturb();
	for (uint64_t at = start >> PAGE_SHIFT; at < last;) {
		uint64_t vpn = page_next(PAGE_SEGMENT, at, last, true);
		const struct area *a = area_next(vpn << PAGE_SHIFT);
		uintptr_t from = vpn << PAGE_SHIFT, to;

		if (vpn >= last || !a)
			break;
		to = min_addr(page_next(PAGE_SEGMENT, vpn, last, false) << PAGE_SHIFT, a->end);
		if (real.mmap((void *)from, to - from, prot_of(a, from), MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
			      0) == MAP_FAILED)
			return -errno;
		area_readvise(a, from, to);
		page_set(PAGE_SEGMENT, vpn, to >> PAGE_SHIFT, false);
		page_set(PAGE_ISLAND, vpn, to >> PAGE_SHIFT, false);
		at = to >> PAGE_SHIFT;
	}
	return 0;
}

/* ---- where the books may be wrong ------------------------------------------------------------------- */

void area_reconcile(uintptr_t start, uintptr_t end)
{
	int err = errno, maps;
	uintptr_t at = start;
	struct vma v;

	if (!area_overlaps(start, end))
		return;
	maps = maps_open();
	if (maps < 0) { /* leave alone whatever is there now */
		area_change(start, end, AREA_EXCLUDED, 0, -1);
		errno = err;
		return;
	}
	while (at < end && vma_find(maps, at, &v)) {
		if (v.start > at)
			area_remove(at, min_addr(v.start, end));
		at = min_addr(v.end, end);
		area_change(v.start > start ? v.start : start, at, 0, 0, vma_prot(&v));
	}
	if (at < end)
		area_remove(at, end);
	maps_close(maps);
	errno = err;
}

bool area_disown(uintptr_t start, uintptr_t end, int maps)
{
	uint64_t vpn = start >> PAGE_SHIFT, last = end >> PAGE_SHIFT, stop;
	bool opens = maps < 0 && has_segments(start, end), any = false;
	struct vma v;

	if (opens)
		maps = maps_open();
	for (; maps >= 0 && (vpn = page_next(PAGE_SEGMENT, vpn, last, true)) < last; vpn = stop) {
		uintptr_t at = vpn << PAGE_SHIFT;

		stop = page_next(PAGE_SEGMENT, vpn, last, false);
		if (!vma_find(maps, at, &v))
			break;
		if (v.start > at) { /* unmapped */
			stop = min_addr(stop, v.start >> PAGE_SHIFT);
			area_remove(at, stop << PAGE_SHIFT);
			any = true;
			continue;
		}
		stop = min_addr(stop, v.end >> PAGE_SHIFT);
		if (vma_is_segment(&v))
			continue;
		page_set(PAGE_SEGMENT, vpn, stop, false);
		page_set(PAGE_ISLAND, vpn, stop, false);
		area_change(at, stop << PAGE_SHIFT, AREA_EXCLUDED, 0, -1);
		any = true;
	}
	if (opens && maps >= 0)
		maps_close(maps);
	return any;
}

void learn_locks(uintptr_t start, uintptr_t end)
{
	int err = errno, maps = area_overlaps(start, end) ? maps_open() : -1;
	struct vma v;

	for (uintptr_t at = start; maps >= 0 && at < end && vma_find(maps, at, &v) && v.start < end; at = v.end)
		/* MADV_COLD takes all memory except locked memory. Before 5.4 the kernel does not know it and refuses
		 * all memory; the stricter reading is right then, too. */
		if (real.madvise((void *)v.start, v.end - v.start, MADV_COLD) && errno == EINVAL)
			area_change(v.start, v.end, AREA_LOCKED, 0, -1);
		else
			area_unlock(v.start, v.end);
	if (maps >= 0)
		maps_close(maps);
	errno = err;
}
