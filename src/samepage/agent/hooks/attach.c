/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Calls that rarely change the memory of an area: process_madvise(2) on the calling process, mseal(2), shmat(2), which
 * may replace mappings, and brk(2).
 */
#include "base/real.h"
#include "base/system.h"
#include "hooks/hooks.h"

#include <limits.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* ---- process_madvise ------------------------------------------------------------------------------------- */

struct pidfd_info { /* include/uapi/linux/pidfd.h, Linux 6.13 */
	uint64_t mask, cgroupid;
	uint32_t pid, tgid, ppid, ids[8], exit_code;
};
#define PIDFD_INFO_REQUEST _IOWR(0xFF, 11, struct pidfd_info)

/* Whether a descriptor that the kernel accepts is of this process, or of one of its threads. Kernels that can tell
 * (6.13) let a process give itself any advice; older ones allow no advice that would discard anything. */
static bool is_self(int pidfd)
{
	struct pidfd_info info = {0};

	if (pidfd < 0) /* PIDFD_SELF_THREAD, PIDFD_SELF_THREAD_GROUP: 6.15 */
		return true;
	return !real.ioctl(pidfd, PIDFD_INFO_REQUEST, &info) && (pid_t)info.tgid == getpid();
}

long sp_process_madvise(int fd, const void *vec, size_t n, int advice, unsigned flags)
{
	const struct iovec *v = vec;
	long done = 0;

	/* With no ranges, the kernel checks the other arguments. */
	if (no_areas() || !n || n > IOV_MAX || real.syscall(SYS_process_madvise, fd, vec, 0, advice, flags) ||
	    !is_self(fd) || !is_readable(v, n * sizeof(*v)))
		return real.syscall(SYS_process_madvise, fd, vec, n, advice, flags);
	for (size_t i = 0; i < n; i++) {
		if (sp_madvise(v[i].iov_base, v[i].iov_len, advice))
			return done ? done : -1;
		done += (long)v[i].iov_len;
	}
	return done;
}

SP_EXPORT ssize_t process_madvise(int fd, const struct iovec *vec, size_t n, int advice, unsigned flags)
{
	return sp_process_madvise(fd, vec, n, advice, flags);
}

/* ---- mseal ------------------------------------------------------------------------------------------------- */

/* Sealed mappings cannot be changed: pages in them can neither be merged any more, nor replaced when merged ones are
 * discarded. So they are made anonymous first, and left alone for good. */
int sp_mseal(void *addr, size_t len, unsigned long flags)
{
	uintptr_t start = (uintptr_t)addr, end = PAGE_ALIGN_UP(start + len);
	sigset_t saved;
	bool ours;
	int ret;

	/* With length 0, the call does nothing but tell whether the kernel knows it. */
	if (no_areas() || end < start || real.syscall(SYS_mseal, addr, 0, flags))
		return (int)real.syscall(SYS_mseal, addr, len, flags);
	mmap_lock(&saved);
	ours = area_overlaps(start, end);
	if (ours)
		area_change(start, end, AREA_EXCLUDED, 0, -1);
	mmap_unlock(&saved);
	if (ours && unmerge(start, end) == -ENOMEM) {
		errno = ENOMEM;
		return -1;
	}
	mmap_lock(&saved);
	ret = (int)real.syscall(SYS_mseal, addr, len, flags);
	if (!ret)
		area_change(start, end, AREA_SEALED | AREA_EXCLUDED, 0, -1);
	mmap_unlock(&saved);
	return ret;
}

/* glibc of Debian 13 does not have it yet. */
SP_EXPORT int mseal(void *addr, size_t len, unsigned long flags)
{
	return sp_mseal(addr, len, flags);
}

/* ---- System V shared memory ---------------------------------------------------------------------------------- */

void *sp_shmat(int id, const void *addr, int flags)
{
	struct shmid_ds segment;
	uintptr_t start;
	sigset_t saved;
	void *p;

	heed_watchers();
	if (watched)
		return next.shmat(id, addr, flags);
	if (no_areas() || real.syscall(SYS_shmctl, id, IPC_STAT, &segment))
		return (void *)real.syscall(SYS_shmat, id, addr, flags);
	mmap_lock(&saved);
	p = (void *)real.syscall(SYS_shmat, id, addr, flags);
	start = p == (void *)-1 ? PAGE_ALIGN_DOWN(addr) : (uintptr_t)p;
	if (p == (void *)-1) {
		if (flags & SHM_REMAP) /* what was there may be gone although the call failed */
			area_reconcile(start, PAGE_ALIGN_UP(start + segment.shm_segsz));
	} else {
		area_remove(start, PAGE_ALIGN_UP(start + segment.shm_segsz));
		blocks_forget(start, PAGE_ALIGN_UP(start + segment.shm_segsz));
	}
	mmap_unlock(&saved);
	return p;
}

SP_EXPORT void *shmat(int id, const void *addr, int flags)
{
	return sp_shmat(id, addr, flags);
}

/* ---- the break ------------------------------------------------------------------------------------------------- */

static uintptr_t current_break(void)
{
	return (uintptr_t)real.syscall(SYS_brk, 0);
}

/* Of no concern to the agent, now or later. */
static bool break_is_free(void)
{
	return no_areas() && !agent_may_come();
}

/*
 * The break went from `before` to `after`. Needs the lock. Returns how many bytes the program took: they are like what
 * it maps itself. libc's malloc, which moves the break past us, gives none of them back: it lowers the break only if it
 * stands where malloc itself last put it, and only by memory that malloc took.
 */
static size_t break_moved(uintptr_t before, uintptr_t after)
{
	uintptr_t from = PAGE_ALIGN_UP(min_addr(before, after)), to = PAGE_ALIGN_UP(before < after ? after : before);

	if (from >= to)
		return 0;
	area_remove(from, to);
	if (after < before || !agent_may_come())
		return 0;
	area_add(from, to, AREA_MAPPED | area_new_flags(), PROT_READ | PROT_WRITE);
	return to - from;
}

static void start_for(size_t grown)
{
	if (grown && merges_mapped())
		agent_start_unnamed(grown);
}

uintptr_t sp_brk(uintptr_t addr)
{
	uintptr_t before, ret;
	sigset_t saved;
	size_t grown;

	if (break_is_free() || !addr)
		return (uintptr_t)real.syscall(SYS_brk, addr);
	mmap_lock(&saved);
	before = current_break();
	ret = (uintptr_t)real.syscall(SYS_brk, addr);
	grown = break_moved(before, current_break());
	mmap_unlock(&saved);
	start_for(grown);
	return ret;
}

SP_EXPORT int brk(void *addr)
{
	uintptr_t before;
	sigset_t saved;
	size_t grown;
	int ret;

	need_next();
	if (break_is_free())
		return next.brk(addr);
	mmap_lock(&saved);
	before = current_break();
	ret = next.brk(addr);
	grown = break_moved(before, current_break());
	mmap_unlock(&saved);
	start_for(grown);
	return ret;
}

SP_EXPORT void *sbrk(intptr_t by)
{
	uintptr_t before;
	sigset_t saved;
	size_t grown;
	void *ret;

	need_next();
	if (break_is_free() || !by)
		return next.sbrk(by);
	mmap_lock(&saved);
	before = current_break();
	ret = next.sbrk(by);
	if (by > 0 && ret != (void *)-1) /* and no more, should malloc have moved it meanwhile */
		grown = break_moved((uintptr_t)ret, (uintptr_t)ret + (uintptr_t)by);
	else
		grown = break_moved(before, current_break());
	mmap_unlock(&saved);
	start_for(grown);
	return ret;
}
