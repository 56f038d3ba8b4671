/* SPDX-License-Identifier: Apache-2.0 */
/* The calls that lock memory, and those that limit it. */
#include "base/real.h"
#include "hooks/hooks.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>

/* Marks memory that the kernel locked. If it is no area yet it becomes one, so that it is known to be locked should it
 * be advised later; with prot 0 the agent will not look at it. */
static void mark_locked(uintptr_t start, uintptr_t end)
{
	if (area_overlaps(start, end) || agent_may_come())
		area_cover(start, end, AREA_LOCKED, 0, PROT_NONE);
}

static int real_mlock(const void *addr, size_t len, unsigned flags, bool second)
{
	return second ? (int)real.syscall(SYS_mlock2, addr, len, flags) : next.mlock(addr, len);
}

int sp_mlock(const void *addr, size_t len, unsigned flags, bool second)
{
	uintptr_t start = PAGE_ALIGN_DOWN(addr), end = PAGE_ALIGN_UP((uintptr_t)addr + len);
	sigset_t saved;
	int ret;

	need_next();
	if (start >= end || (no_areas() && !agent_may_come()))
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
		return next.munlock(addr, len);
	mmap_lock(&saved);
	ret = next.munlock(addr, len);
	if (!ret)
		area_unlock(start, end);
	else
		learn_locks(start, end);
	mmap_unlock(&saved);
	return ret;
}

int sp_mlockall(int flags)
{
	sigset_t saved;
	int ret;

	need_next();
	if ((flags & MCL_CURRENT) && unmerge_first(0, ADDRESS_END))
		return -1;
	mmap_lock(&saved);
	ret = next.mlockall(flags);
	if (flags & MCL_CURRENT && (!ret || errno != EPERM))
		area_change(0, ADDRESS_END, AREA_LOCKED, 0, -1);
	if (!ret)
		area_lock_future(flags & MCL_FUTURE);
	mmap_unlock(&saved);
	return ret;
}

int sp_munlockall(void)
{
	sigset_t saved;
	int ret;

	need_next();
	mmap_lock(&saved);
	ret = next.munlockall();
	if (!ret)
		area_unlock_all();
	mmap_unlock(&saved);
	return ret;
}

/* ---- limits ------------------------------------------------------------------------------------------- */

/* Sets the limit under the lock, so that no limit appears between the agent's look at it and the step that depends on
 * it (mappings_limited()). */
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

/* ---- libc's names ---------------------------------------------------------------------------------- */

SP_EXPORT int mlock(const void *addr, size_t len)
{
	return sp_mlock(addr, len, 0, false);
}

/* glibc's mlock2() with flags 0 calls mlock(), for kernels before 4.4. We do the same, so we need not ask which kernel
 * it is. */
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
