/* SPDX-License-Identifier: Apache-2.0 */
/* The calls that map, unmap and protect memory, as far as they concern areas. */
#include "base/planes.h"
#include "base/real.h"
#include "hooks/hooks.h"

#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000 /* 4.17 */
#endif
#ifndef MAP_DROPPABLE
#define MAP_DROPPABLE 0x08 /* 6.11 */
#endif

/* ---- mapping --------------------------------------------------------------------------------------- */

/*
 * Virtual machines reserve terabytes that they may never use, and make them writable piece by piece; some make all of
 * it writable at once. The service keeps books of every mergeable page. So memory that cannot be written, or mappings
 * larger than the machine's memory, are not mergeable until a smaller piece is made writable.
 */
static size_t machine_memory;

/* Call it early: later, when the process maps memory, a seccomp filter may forbid sysinfo(2). */
void mmap_note_memory(void)
{
	struct sysinfo info;

	if (!machine_memory && !real.syscall(SYS_sysinfo, &info))
		machine_memory = (info.totalram + info.totalswap) * info.mem_unit;
}

static bool is_reservation(size_t len, int prot)
{
	return !(prot & PROT_WRITE) || len > machine_memory;
}

/* Called before pieces of reservations in the range become memory. Returns further flags for area_change() to set.
 * Needs the lock. */
static unsigned open_reservations(uintptr_t start, uintptr_t end)
{
	for (const struct area *a = area_next(start); a && a->start < end; a = area_next(a->end)) {
		uintptr_t from = a->start > start ? a->start : start, to = min_addr(a->end, end);

		if (a->flags & AREA_RESERVED && merges_mapped() && page_reserve(from >> PAGE_SHIFT, to >> PAGE_SHIFT))
			return AREA_EXCLUDED;
	}
	return 0;
}

/*
 * The area flags that follow from how the program maps memory. AREA_MAPPED: mergeable if merges_mapped(), now or later.
 * Excluded are mappings that grow, which they would not any more with a segment at the end, and memory that the kernel
 * may drop, which the segment would keep. The kernel gives stacks no huge pages (6.7).
 */
static unsigned mapped_flags(int flags)
{
	int type = flags & MAP_TYPE;

	if (!begun)
		mmap_note_memory();
	if (!agent_may_come() || !(flags & MAP_ANONYMOUS) || flags & MAP_HUGETLB ||
	    (type != MAP_PRIVATE && type != MAP_DROPPABLE))
		return 0;
	if (type == MAP_DROPPABLE || flags & MAP_GROWSDOWN)
		return AREA_EXCLUDED;
	return flags & MAP_STACK ? AREA_NOHUGEPAGE : AREA_MAPPED;
}

static void *map(void *addr, size_t len, int prot, int flags, int fd, off_t offset)
{
	bool fixed = flags & (MAP_FIXED | MAP_FIXED_NOREPLACE);
	unsigned own;
	uintptr_t start, end;
	sigset_t saved;
	void *p;

	heed_watchers();
	own = mapped_flags(flags);
	if (!own && no_areas())
		return real.mmap(addr, len, prot, flags, fd, offset);
	mmap_lock(&saved);
	p = real.mmap(addr, len, prot, flags, fd, offset);
	if (p == MAP_FAILED) {
		if (fixed) /* the kernel may have unmapped what was there before the call failed */
			area_reconcile(PAGE_ALIGN_DOWN(addr), PAGE_ALIGN_UP((uintptr_t)addr + len));
		own = 0;
	} else {
		start = (uintptr_t)p;
		end = PAGE_ALIGN_UP(start + len);
		/* Do this without MAP_FIXED, too: if there is an area here, it was unmapped without passing a
		 * wrapper. */
		area_remove(start, end);
		blocks_forget(start, end);
		if (own & AREA_MAPPED && is_reservation(len, prot))
			own |= AREA_RESERVED;
		if (own)
			area_add(start, end, own | area_new_flags(), prot);
	}
	mmap_unlock(&saved);
	if (own & AREA_MAPPED && !(own & AREA_RESERVED) && merges_mapped())
		agent_start_unnamed(len);
	return p;
}

void *sp_mmap(void *addr, size_t len, int prot, int flags, int fd, off_t offset)
{
	void *p = map(addr, len, prot, flags, fd, offset);

	return p != MAP_FAILED || errno != ENOMEM || !relieve(len) ? p : map(addr, len, prot, flags, fd, offset);
}

static int unmap(void *addr, size_t len)
{
	uintptr_t start = (uintptr_t)addr;
	sigset_t saved;
	int ret;

	heed_watchers();
	if (no_areas())
		return real.munmap(addr, len);
	mmap_lock(&saved);
	ret = real.munmap(addr, len);
	if (!ret) {
		area_remove(start, PAGE_ALIGN_UP(start + len));
		blocks_forget(start, PAGE_ALIGN_UP(start + len));
	}
	mmap_unlock(&saved);
	return ret;
}

int sp_munmap(void *addr, size_t len)
{
	int ret = unmap(addr, len);

	return ret && errno == ENOMEM && relieve_mappings() ? unmap(addr, len) : ret;
}

int unmerge_first(uintptr_t start, uintptr_t end)
{
	bool any;
	sigset_t saved;

	if (no_areas())
		return 0;
	mmap_lock(&saved);
	any = has_segments(start, end);
	mmap_unlock(&saved);
	if (any && unmerge(start, end) == -ENOMEM) {
		errno = ENOMEM;
		return -1;
	}
	return 0;
}

static int real_mprotect(void *addr, size_t len, int prot, int pkey)
{
	if (pkey == -1)
		return real.mprotect(addr, len, prot);
	return (int)real.syscall(SYS_pkey_mprotect, addr, len, prot, pkey);
}

static int protect(void *addr, size_t len, int prot, int pkey)
{
	uintptr_t start = PAGE_ALIGN_DOWN(addr), end = PAGE_ALIGN_UP((uintptr_t)addr + len);
	sigset_t saved;
	int ret;

	if (no_areas())
		return real_mprotect(addr, len, prot, pkey);
	/* A later mapping would lack the key, and the agent's thread may have no access with it. */
	if (pkey > 0 && unmerge_first(start, end))
		return -1;
	mmap_lock(&saved);
	ret = real_mprotect(addr, len, prot, pkey);
	if (ret) { /* a part of the range may have changed all the same */
		area_reconcile(start, end);
	} else {
		unsigned set = pkey > 0 ? AREA_EXCLUDED : 0, clear = is_reservation(len, prot) ? 0 : AREA_RESERVED;

		if (clear)
			set |= open_reservations(start, end);
		area_change(start, end, set, clear, prot & (PROT_READ | PROT_WRITE | PROT_EXEC));
	}
	mmap_unlock(&saved);
	if (!ret && merges_mapped() && !is_reservation(len, prot))
		agent_start_unnamed(len);
	return ret;
}

int sp_mprotect(void *addr, size_t len, int prot, int pkey)
{
	int ret = protect(addr, len, prot, pkey);

	return ret && errno == ENOMEM && !no_areas() && relieve_mappings() ? protect(addr, len, prot, pkey) : ret;
}

/* ---- policies ---------------------------------------------------------------------------- */

/* Memory with a policy is left alone: a later mapping would lack the policy; and the policy of a segment's mapping is
 * the segment's, which others use, too. */
long sp_set_policy(long number, const long *arg)
{
	uintptr_t start = PAGE_ALIGN_DOWN(arg[0]), end = PAGE_ALIGN_UP((uintptr_t)arg[0] + (uintptr_t)arg[1]);
	sigset_t saved;
	long ret;

	if (start >= end || (number == SYS_mbind && arg[2] == MPOL_DEFAULT) || (no_areas() && !agent_may_come()))
		return real.syscall(number, arg[0], arg[1], arg[2], arg[3], arg[4], arg[5]);
	mmap_lock(&saved);
	if (area_overlaps(start, end) || agent_may_come())
		area_cover(start, end, AREA_EXCLUDED, 0, PROT_NONE);
	mmap_unlock(&saved);
	if (unmerge_first(start, end))
		return -1;
	ret = real.syscall(number, arg[0], arg[1], arg[2], arg[3], arg[4], arg[5]);
	return ret;
}

/* ---- libc's names ---------------------------------------------------------------------------------- */

SP_EXPORT void *mmap(void *addr, size_t len, int prot, int flags, int fd, off_t offset)
{
	return sp_mmap(addr, len, prot, flags, fd, offset);
}

SP_EXPORT void *mmap64(void *addr, size_t len, int prot, int flags, int fd, off64_t offset)
{
	return sp_mmap(addr, len, prot, flags, fd, offset);
}

SP_EXPORT int munmap(void *addr, size_t len)
{
	return sp_munmap(addr, len);
}

SP_EXPORT int mprotect(void *addr, size_t len, int prot)
{
	return sp_mprotect(addr, len, prot, -1);
}

SP_EXPORT int pkey_mprotect(void *addr, size_t len, int prot, int pkey)
{
	return sp_mprotect(addr, len, prot, pkey);
}
