/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The invariants of the agent's books, for a build that checks them (-Ddebug_checks=true). A check that fails prints
 * one line on descriptor 2 and aborts. Checks that take long (many areas, questions to the kernel) do not run at every
 * unlock, and look at only a part each time.
 */
#include "base/check.h"

#ifdef SAMEPAGE_CHECK

#include "base/area.h"
#include "base/maps.h"
#include "base/planes.h"
#include "base/real.h"
#include "base/system.h"

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>

#define AREAS_EACH 64	/* areas checked at one unlock */
#define RUNS_EACH 64	/* runs of pages of one kind */
#define PLANES_EVERY 16 /* unlocks */
#define KERNEL_EVERY 64
#define MAPPINGS_EACH 32

_Noreturn void check_failed(const char *line)
{
	const struct
	{ /* the kernel's struct sigaction, SIG_DFL: the lock may be held, so no handler of the application's may run */
		uint64_t handler, flags, restorer, mask;
	} action = {0};
	const uint64_t none = 0;

	/* The agent's thread has a file table without descriptor 2. */
	if (real.syscall(SYS_write, 2, line, strlen(line)) < 0)
		real.syscall(SYS_write, real.syscall(SYS_openat, AT_FDCWD, "/proc/self/fd/2", O_WRONLY | O_APPEND),
			     line, strlen(line));
	real.syscall(SYS_rt_sigaction, SIGABRT, &action, NULL, sizeof(none));
	real.syscall(SYS_rt_sigprocmask, SIG_SETMASK, &none, NULL, sizeof(none));
	real.syscall(SYS_tgkill, real.syscall(SYS_getpid), real.syscall(SYS_gettid), SIGABRT);
	__builtin_trap();
}

/* Checks some areas, starting where the last call ended. */
static void check_areas(void)
{
	static uintptr_t from;
	const struct area *a, *before = NULL;
	unsigned long looked = 0;

	for (a = area_next(from); a && looked < AREAS_EACH; a = area_next(from), looked++) {
		VM_BUG_ON(a->start >= a->end);
		VM_BUG_ON((a->start | a->end) % PAGE_SIZE);
		VM_BUG_ON(before && a->start < before->end);
		VM_BUG_ON(a->prot & ~(PROT_READ | PROT_WRITE | PROT_EXEC));
		VM_BUG_ON(before && before->end == a->start && before->flags == a->flags && before->prot == a->prot &&
			  !(a->flags & AREA_EXCLUDED)); /* they should be one */
		before = a;
		from = a->end;
	}
	VM_BUG_ON(looked > nr_areas);
	if (!a)
		from = 0;
}

/* Checks that all that is mapped from a segment lies in an area, starting where the last call ended. */
static void check_segments(void)
{
	static uint64_t vpn;
	const uint64_t last = ADDRESS_END >> PAGE_SHIFT;

	for (int i = 0; i < RUNS_EACH; i++) {
		const struct area *a;

		vpn = page_next(PAGE_SEGMENT, vpn, last, true);
		if (vpn == last) {
			vpn = 0;
			return;
		}
		a = area_next(vpn << PAGE_SHIFT);
		VM_BUG_ON(!a || a->start > vpn << PAGE_SHIFT);
		vpn = min_addr(page_next(PAGE_SEGMENT, vpn, last, false), a->end >> PAGE_SHIFT);
	}
}

/* Checks that each island lies in a mapping of a segment. */
static void check_islands(void)
{
	static uint64_t vpn;
	const uint64_t last = ADDRESS_END >> PAGE_SHIFT;

	for (int i = 0; i < RUNS_EACH; i++) {
		uint64_t end;

		vpn = page_next(PAGE_ISLAND, vpn, last, true);
		if (vpn == last) {
			vpn = 0;
			return;
		}
		end = page_next(PAGE_ISLAND, vpn, last, false);
		VM_BUG_ON(page_next(PAGE_SEGMENT, vpn, end, false) < end);
		vpn = end;
	}
}

/* Checks that a page is mapped from a file if and only if its PAGE_SEGMENT bit is set, starting where the last call
 * ended. */
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
		/* An area that exists only because it is locked may be of any file. */
		if (vpn < end && !(a->flags & (AREA_EXCLUDED | AREA_UNPINNED)) &&
		    a->flags & (AREA_ALLOC | AREA_ADVISED | AREA_MAPPED)) {
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
	if (unlocks % PLANES_EVERY == 0) {
		check_segments();
		check_islands();
	}
	if (unlocks % KERNEL_EVERY == 0)
		check_against_kernel();
	errno = saved;
}

#endif
