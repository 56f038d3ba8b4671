/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The invariants of the agent's books, for a build that checks them (-Ddebug_checks=true). A check that fails says so in
 * one line on descriptor 2 and aborts. With many areas, or where the kernel has to be asked, it is not every unlock that
 * checks, and not everything that one looks at.
 */
#include "wrappers.h"

#ifdef SAMEPAGE_CHECK

#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>

#define AREAS_EACH 64	/* areas looked at before one unlock */
#define PLANES_EVERY 16 /* unlocks */
#define KERNEL_EVERY 64
#define MAPPINGS_EACH 32

_Noreturn void check_failed(const char *what, const char *file, int line)
{
	char text[512];
	int len = snprintf(text, sizeof(text), "samepage: %s:%d: %s\n", file, line, what);

	real.syscall(SYS_write, 2, text, (size_t)len);
	signal(SIGABRT, SIG_DFL); /* no handler of the application's: the lock may be held */
	abort();
}

/* A number of areas, from where the last look ended. */
static void check_areas(void)
{
	static uintptr_t from;
	const struct area *a, *before = NULL;
	unsigned long looked = 0;

	for (a = area_next(from); a && looked < AREAS_EACH; a = area_next(from), looked++) {
		VM_BUG_ON(a->start >= a->end);
		VM_BUG_ON((a->start | a->end) % PAGE_SIZE);
		VM_BUG_ON(before && a->start < before->end);
		VM_BUG_ON(a->prot & ~7);
		VM_BUG_ON(before && before->end == a->start && before->flags == a->flags && before->prot == a->prot &&
			  !(a->flags & AREA_EXCLUDED)); /* they should be one */
		before = a;
		from = a->end;
	}
	VM_BUG_ON(looked > nr_areas);
	if (!a)
		from = 0;
}

/* What is mapped from a segment lies in an area, and an island in what is mapped from a segment. */
static void check_planes(void)
{
	const uint64_t last = ADDRESS_END >> PAGE_SHIFT;
	uint64_t vpn, end;

	for (vpn = page_next(PAGE_SEGMENT, 0, last, true); vpn < last; vpn = page_next(PAGE_SEGMENT, end, last, true)) {
		const struct area *a = area_next(vpn << PAGE_SHIFT);

		VM_BUG_ON(!a || a->start > vpn << PAGE_SHIFT);
		end = min_addr(page_next(PAGE_SEGMENT, vpn, last, false), a->end >> PAGE_SHIFT);
	}
	for (vpn = page_next(PAGE_ISLAND, 0, last, true); vpn < last; vpn = page_next(PAGE_ISLAND, end, last, true)) {
		end = page_next(PAGE_ISLAND, vpn, last, false);
		VM_BUG_ON(page_next(PAGE_SEGMENT, vpn, end, false) < end);
	}
}

/* A page is mapped from a file if and only if the plane says that it is from a segment. Goes on where the last look ended. */
static void check_against_kernel(void)
{
	static uintptr_t from;
	int maps = maps_open();
	const struct area *a;
	struct vma v;

	for (int i = 0; maps >= 0 && i < MAPPINGS_EACH; i++, from = v.end) {
		uint64_t vpn, end;

		a = area_next(from);
		if (!a || !vma_find(maps, a->start > from ? a->start : from, &v)) {
			from = 0;
			break;
		}
		vpn = (v.start > a->start ? v.start : a->start) >> PAGE_SHIFT;
		end = min_addr(v.end, a->end) >> PAGE_SHIFT;
		if (vpn < end && !(a->flags & AREA_EXCLUDED)) {
			VM_BUG_ON(page_next(PAGE_SEGMENT, vpn, end, !v.ino) < end);
			VM_BUG_ON(v.ino && v.shared);
		}
		v.end = end > vpn ? end << PAGE_SHIFT : a->end;
	}
	if (maps >= 0)
		maps_close(maps);
}

void check_books(void)
{
	static unsigned long unlocks;
	int saved = errno;

	check_areas();
	unlocks++;
	if (unlocks % PLANES_EVERY == 0)
		check_planes();
	if (unlocks % KERNEL_EVERY == 0)
		check_against_kernel();
	errno = saved;
}

void check_windows(void)
{
	const struct pm_walk any = {.any = PAGE_IS_PRESENT | PAGE_IS_SWAPPED};
	const uintptr_t windows[] = {kernel.scratch, kernel.huge};
	struct page_region v;
	uintptr_t walked;

	for (size_t i = 0; i < sizeof(windows) / sizeof(windows[0]); i++)
		if (windows[i])
			VM_BUG_ON(pagemap_walk(windows[i], windows[i] + WINDOW, &any, &v, 1, &walked) > 0);
}

#endif
