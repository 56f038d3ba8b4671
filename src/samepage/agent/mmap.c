/* SPDX-License-Identifier: Apache-2.0 */
/* The calls that map, unmap, protect and lock memory, where they meet an area. */
#include "wrappers.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000 /* 4.17 */
#endif
#ifndef MAP_DROPPABLE
#define MAP_DROPPABLE 0x08 /* 6.11 */
#endif
#define MPOL_DEFAULT 0

static _Atomic bool lock_future; /* mlockall(MCL_FUTURE) */

unsigned area_new_flags(void)
{
	return lock_future ? AREA_LOCKED : 0;
}

int area_cover(uintptr_t start, uintptr_t end, unsigned set, unsigned clear, int prot)
{
	uintptr_t stop;

	/* A gap before each area and one behind the last; two pieces more of the first and the last. */
	if (area_reserve(area_count(start, end) + 3)) {
		if (!(set & AREA_ADVISED)) /* what is locked or excluded is left alone at any price */
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

void area_reconcile(uintptr_t start, uintptr_t end)
{
	int err = errno, maps;
	uintptr_t at = start;
	struct vma v;

	if (!area_overlaps(start, end))
		return;
	maps = maps_open();
	if (maps < 0) { /* whatever stands there now, it is not touched */
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

bool area_disown(uintptr_t start, uintptr_t end)
{
	uint64_t vpn = start >> PAGE_SHIFT, last = end >> PAGE_SHIFT, stop;
	int maps = !has_segments(start, end) ? -1 : on_agent_thread() ? kernel.maps : maps_open();
	bool any = false;
	struct vma v;

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
	if (maps >= 0 && !on_agent_thread())
		maps_close(maps);
	return any;
}

/* ---- mapping --------------------------------------------------------------------------------------- */

/*
 * Virtual machines reserve terabytes that they may never use, and make them writable piece by piece; some make all of it
 * writable at once. The service keeps books of every page that is mergeable: so what cannot be written, or is more than
 * the machine has memory, is not, until a smaller piece is made writable.
 */
static size_t machine_memory;

/* While the process may still ask: a seccomp filter may allow that no more when it maps. */
void mmap_note_memory(void)
{
	struct sysinfo info;

	if (!real.syscall(SYS_sysinfo, &info))
		machine_memory = (info.totalram + info.totalswap) * info.mem_unit;
}

static bool is_reservation(size_t len, int prot)
{
	return !(prot & PROT_WRITE) || len > machine_memory;
}

/* Pieces of reservations in the range become memory. Needs the lock. Returns what else area_change() is to set. */
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
 * What is known of memory from how the program maps it. AREA_MAPPED: it is mergeable if merges_mapped(), now or later.
 * A mapping that grows would not any more once its end is a segment's, and what the kernel may drop the segment would keep;
 * the kernel gives stacks no huge pages (6.7).
 */
static unsigned mapped_flags(int flags)
{
	int type = flags & MAP_TYPE;

	if (!agent_configured() || !(flags & MAP_ANONYMOUS) || flags & MAP_HUGETLB ||
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

	need_real();
	own = mapped_flags(flags);
	if (!own && no_areas())
		return real.mmap(addr, len, prot, flags, fd, offset);
	mmap_lock(&saved);
	p = real.mmap(addr, len, prot, flags, fd, offset);
	if (p == MAP_FAILED) {
		if (fixed) /* the kernel may have unmapped what was there before it failed */
			area_reconcile(PAGE_ALIGN_DOWN(addr), PAGE_ALIGN_UP((uintptr_t)addr + len));
		own = 0;
	} else {
		start = (uintptr_t)p;
		end = PAGE_ALIGN_UP(start + len);
		/* Without MAP_FIXED, too: an area that stands here was unmapped where no wrapper saw it. */
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

/* Some calls want private copies of all pages. For merged ones that takes memory, and a break knows beforehand
 * whether it is there. -1 with errno ENOMEM when it is not. */
static int unmerge_first(uintptr_t start, uintptr_t end)
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
	/* A mapping to come would lack the key, and the agent's thread may not have the right to it. */
	if (pkey > 0 && unmerge_first(start, end))
		return -1;
	mmap_lock(&saved);
	ret = real_mprotect(addr, len, prot, pkey);
	if (ret) { /* but a part of the range may have changed */
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

/* ---- policies and limits ---------------------------------------------------------------------------- */

/* A mapping to come would lack the policy, and that of a segment's mapping is the segment's, which is others', too. */
long sp_set_policy(long number, const long *arg)
{
	uintptr_t start = PAGE_ALIGN_DOWN(arg[0]), end = PAGE_ALIGN_UP((uintptr_t)arg[0] + (uintptr_t)arg[1]);
	sigset_t saved;
	long ret;

	if (start >= end || (number == SYS_mbind && arg[2] == MPOL_DEFAULT) || (no_areas() && !agent_configured()))
		return real.syscall(number, arg[0], arg[1], arg[2], arg[3], arg[4], arg[5]);
	mmap_lock(&saved);
	if (area_overlaps(start, end) || agent_configured())
		area_cover(start, end, AREA_EXCLUDED, 0, PROT_NONE);
	mmap_unlock(&saved);
	if (unmerge_first(start, end))
		return -1;
	ret = real.syscall(number, arg[0], arg[1], arg[2], arg[3], arg[4], arg[5]);
	return ret;
}

/* Under the lock, so that no limit comes between the agent's look at it and what depends on it (mappings_limited()). */
int sp_prlimit(pid_t pid, int resource, const void *to, void *old)
{
	sigset_t saved;
	int ret;

	if (!to || no_areas())
		return (int)real.syscall(SYS_prlimit64, pid, resource, to, old);
	mmap_lock(&saved);
	ret = (int)real.syscall(SYS_prlimit64, pid, resource, to, old);
	mmap_unlock(&saved);
	return ret;
}

/* ---- locking --------------------------------------------------------------------------------------- */

/* Marks what the kernel locked. Memory that is no area yet becomes one, so that it is known to be locked
 * should it be advised later; with prot 0 the agent will not look at it. */
static void mark_locked(uintptr_t start, uintptr_t end)
{
	if (area_overlaps(start, end) || agent_configured())
		area_cover(start, end, AREA_LOCKED, 0, PROT_NONE);
}

static void mark_unlocked(uintptr_t start, uintptr_t end)
{
	const struct area *a;

	area_change(start, end, 0, AREA_LOCKED, -1);
	/* An area may be longer than the range, on both sides: what was cut for the lock is one piece again. */
	for (uintptr_t at = start, stop; at < end && (a = area_next(at)) && a->start < end; at = stop) {
		stop = min_addr(a->end, end);
		if (!a->flags) /* was only known for being locked */
			area_remove(a->start > start ? a->start : start, stop);
	}
}

void all_unlocked(void)
{
	mark_unlocked(0, ADDRESS_END);
	lock_future = false;
}

void learn_locks(uintptr_t start, uintptr_t end)
{
	int err = errno, maps = area_overlaps(start, end) ? maps_open() : -1;
	struct vma v;

	for (uintptr_t at = start; maps >= 0 && at < end && vma_find(maps, at, &v) && v.start < end; at = v.end)
		/* Which takes all memory but what is locked; before 5.4 none, and the stricter reading is as well. */
		if (real.madvise((void *)v.start, v.end - v.start, MADV_COLD) && errno == EINVAL)
			area_change(v.start, v.end, AREA_LOCKED, 0, -1);
		else
			mark_unlocked(v.start, v.end);
	if (maps >= 0)
		maps_close(maps);
	errno = err;
}

static int real_mlock(const void *addr, size_t len, unsigned flags, bool second)
{
	return second ? (int)real.syscall(SYS_mlock2, addr, len, flags) : real.mlock(addr, len);
}

int sp_mlock(const void *addr, size_t len, unsigned flags, bool second)
{
	uintptr_t start = PAGE_ALIGN_DOWN(addr), end = PAGE_ALIGN_UP((uintptr_t)addr + len);
	sigset_t saved;
	int ret;

	need_real();
	if (start >= end || (no_areas() && !agent_configured()))
		return real_mlock(addr, len, flags, second);
	if (unmerge_first(start, end))
		return -1;
	mmap_lock(&saved);
	ret = real_mlock(addr, len, flags, second);
	if (!ret)
		mark_locked(start, end);
	else
		learn_locks(start, end);
	mmap_unlock(&saved);
	return ret;
}

int sp_munlock(const void *addr, size_t len)
{
	uintptr_t start = PAGE_ALIGN_DOWN(addr), end = PAGE_ALIGN_UP((uintptr_t)addr + len);
	sigset_t saved;
	int ret;

	if (no_areas())
		return real.munlock(addr, len);
	mmap_lock(&saved);
	ret = real.munlock(addr, len);
	if (!ret)
		mark_unlocked(start, end);
	else
		learn_locks(start, end);
	mmap_unlock(&saved);
	return ret;
}

int sp_mlockall(int flags)
{
	sigset_t saved;
	int ret;

	need_real();
	if ((flags & MCL_CURRENT) && unmerge_first(0, ADDRESS_END))
		return -1;
	mmap_lock(&saved);
	ret = real.mlockall(flags);
	if (flags & MCL_CURRENT && (!ret || errno != EPERM))
		area_change(0, ADDRESS_END, AREA_LOCKED, 0, -1);
	if (!ret)
		lock_future = flags & MCL_FUTURE;
	mmap_unlock(&saved);
	return ret;
}

int sp_munlockall(void)
{
	sigset_t saved;
	int ret;

	need_real();
	mmap_lock(&saved);
	ret = real.munlockall();
	if (!ret)
		all_unlocked();
	mmap_unlock(&saved);
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

SP_EXPORT int mlock(const void *addr, size_t len)
{
	return sp_mlock(addr, len, 0, false);
}

/* glibc's answers flags of 0 by mlock, for kernels before 4.4; so do we not need to ask which it is. */
SP_EXPORT int mlock2(const void *addr, size_t len, unsigned flags)
{
	return sp_mlock(addr, len, flags, flags != 0);
}

SP_EXPORT int munlock(const void *addr, size_t len)
{
	return sp_munlock(addr, len);
}

SP_EXPORT int mlockall(int flags)
{
	return sp_mlockall(flags);
}

SP_EXPORT int munlockall(void)
{
	return sp_munlockall();
}

SP_EXPORT int setrlimit(__rlimit_resource_t resource, const struct rlimit *to)
{
	return sp_prlimit(0, (int)resource, to, NULL);
}

SP_EXPORT int setrlimit64(__rlimit_resource_t resource, const struct rlimit64 *to)
{
	return sp_prlimit(0, (int)resource, to, NULL);
}

SP_EXPORT int prlimit(pid_t pid, enum __rlimit_resource resource, const struct rlimit *to, struct rlimit *old)
{
	return sp_prlimit(pid, (int)resource, to, old);
}

SP_EXPORT int prlimit64(pid_t pid, enum __rlimit_resource resource, const struct rlimit64 *to, struct rlimit64 *old)
{
	return sp_prlimit(pid, (int)resource, to, old);
}
