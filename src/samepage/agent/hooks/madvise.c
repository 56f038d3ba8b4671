/* SPDX-License-Identifier: Apache-2.0 */
/*
 * madvise(2) and prctl(PR_SET_MEMORY_MERGE). MADV_MERGEABLE and MADV_UNMERGEABLE are answered here, by the rules of the
 * kernel's madvise_walk_vmas() and ksm_madvise(). Advice that discards memory must find anonymous memory instead of
 * merged pages, since discarded memory reads as zeros afterwards. All other advice goes to the kernel, and is
 * remembered if later mappings have to be given it too.
 */
#include "base/maps.h"
#include "base/planes.h"
#include "base/real.h"
#include "hooks/hooks.h"
#include "pages/pages.h"

#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#define UNMERGE_BATCH SECTION_MAX /* pages; after each batch the lock is free and pending signal handlers run */

/* ---- discarding ------------------------------------------------------------------------------------- */

/* Discards merged pages of one area. An area may only seem locked (a fork unlocks the child's memory, a move with
 * MREMAP_DONTUNMAP a whole mapping); but memory that is thought to be locked is not merged, so AREA_LOCKED decides
 * here. Returns 0 or -errno. */
static int discard_merged(uintptr_t start, uintptr_t end, int advice)
{
	const struct area *a = area_next(start);

	if (a && a->flags & AREA_LOCKED && advice != MADV_DONTNEED_LOCKED)
		return -EINVAL;
	if (advice == MADV_FREE) { /* which may do nothing, so a failure does not matter */
		discard_segments(start, end);
		return 0;
	}
	if (zero_segments(start, end))
		return a && a->flags & AREA_SEALED ? -EPERM : -EAGAIN;
	/* A guard has to go on the new mapping; for all other advice, a new mapping is as good as a discard. */
	return advice == MADV_GUARD_INSTALL && real.madvise((void *)start, end - start, advice) ? -errno : 0;
}

/* Works piece by piece, as the kernel does: it skips holes, and stops at what it refuses (locked memory), so that
 * everything behind that keeps its contents. */
static int discard(uintptr_t start, uintptr_t end, int advice)
{
	int err = 0, hole = 0;

	area_disown(start, end, -1);
	if (advice == MADV_GUARD_INSTALL) /* a guard would give the agent a SIGSEGV, too */
		area_change(start, end, AREA_EXCLUDED, 0, -1);
	for (uintptr_t at = start, stop; at < end && !err; at = stop) {
		uint64_t vpn = at >> PAGE_SHIFT, last = end >> PAGE_SHIFT;
		const struct area *a = area_next(at);
		bool merged = page_test(PAGE_SEGMENT, vpn);

		stop = page_next(PAGE_SEGMENT, vpn, last, !merged) << PAGE_SHIFT;
		if (merged && a)
			stop = min_addr(stop, a->end);
		if (merged)
			err = discard_merged(at, stop, advice);
		else if (real.madvise((void *)at, stop - at, advice))
			err = -errno;
		if (err == -ENOMEM) {
			hole = err;
			err = 0;
		}
	}
	errno = err ? -err : -hole;
	return err || hole ? -1 : 0;
}

/* ---- merging ---------------------------------------------------------------------------------------- */

/* Whether both the kernel and we may merge the mapping. Not the stack that we run on: it grows under our feet. */
static bool is_mergeable(const struct vma *v)
{
	uintptr_t here = (uintptr_t)&v;

	return !v->shared && !v->ino && !(v->start <= here && here < v->end);
}

/* Makes a range mergeable. Returns 0 or -ENOMEM: a part is not mapped (the rest is an area now), or there is no memory
 * to note it. */
static int advise_range(uintptr_t start, uintptr_t end)
{
	int maps = maps_open(), err = maps < 0 ? maps : 0, hole = 0;
	struct vma v;

	for (uintptr_t at = start; !err && at < end; at = v.end) {
		uintptr_t stop;

		if (!vma_find(maps, at, &v) || v.start >= end) {
			hole = -ENOMEM;
			break;
		}
		if (v.start > at) {
			hole = -ENOMEM;
			at = v.start;
		}
		stop = min_addr(v.end, end);
		if (is_mergeable(&v) || page_test(PAGE_SEGMENT, at >> PAGE_SHIFT))
			err = area_cover(at, stop, AREA_ADVISED, AREA_UNMERGED, vma_prot(&v));
	}
	if (maps >= 0)
		maps_close(maps);
	alloc_note_advised(start, end);
	return err ? err : hole;
}

int unmerge(uintptr_t start, uintptr_t end)
{
	struct sp_broken out;
	sigset_t saved;

	mmap_lock(&saved);
	area_change(start, end, AREA_UNMERGING, 0, -1);
	mmap_unlock(&saved);
	do
		unmerge_range(start, end, UNMERGE_BATCH, &out);
	while (out.error == EAGAIN);
	mmap_lock(&saved);
	area_change(start, end, 0, AREA_UNMERGING, -1);
	mmap_unlock(&saved);
	return -out.error;
}

/* The same for good, for MADV_UNMERGEABLE. */
static int withdraw_advice(uintptr_t start, uintptr_t end)
{
	struct sp_broken out;
	int err;

	do
		err = samepage_unmerge((void *)start, end - start, UNMERGE_BATCH, &out);
	while (err == -EAGAIN);
	return err;
}

static int merge_advice(uintptr_t start, uintptr_t end, int advice)
{
	sigset_t saved;
	int err;

	if (advice == MADV_MERGEABLE) {
		mmap_lock(&saved);
		err = advise_range(start, end);
		mmap_unlock(&saved);
		agent_start();
	} else {
		err = withdraw_advice(start, end);
		/* Only says whether all of the range is mapped. */
		if (!err && real.syscall(SYS_msync, start, end - start, MS_ASYNC))
			err = -errno;
	}
	if (!err)
		return 0;
	errno = -err;
	return -1;
}

int sp_set_memory_merge(bool on)
{
	int err = !on && merge_any ? withdraw_advice(0, ADDRESS_END) : 0;
	bool start = false;
	sigset_t saved;

	if (err)
		return err;
	mmap_lock(&saved);
	if (on != merge_any) {
		if (on)
			area_change(0, ADDRESS_END, 0, AREA_UNMERGED, -1);
		area_merge_any(on);
		start = on;
	}
	mmap_unlock(&saved);
	/* The kernel keeps the setting for us across an exec (initialise() in wrappers.c). If its own ksmd runs, that
	 * merges, too. */
	if (!kernel_serves_others)
		real.prctl(PR_SET_MEMORY_MERGE, (unsigned long)on, 0, 0, 0);
	if (start)
		agent_start();
	return 0;
}

/* ---- everything else --------------------------------------------------------------------------------- */

/* Remembers advice that later mappings in the range have to be given, after the kernel took it. */
static void remember(uintptr_t start, uintptr_t end, int advice)
{
	static const struct {
		int advice;
		unsigned set, clear;
	} flags[] = {
		{MADV_DONTFORK, AREA_DONTFORK, 0},
		{MADV_DOFORK, 0, AREA_DONTFORK},
		{MADV_DONTDUMP, AREA_DONTDUMP, 0},
		{MADV_DODUMP, 0, AREA_DONTDUMP},
		{MADV_HUGEPAGE, AREA_HUGEPAGE, AREA_NOHUGEPAGE},
		{MADV_NOHUGEPAGE, AREA_NOHUGEPAGE, AREA_HUGEPAGE},
		{MADV_KEEPONFORK, 0, AREA_WIPE},
		{MADV_SEQUENTIAL, AREA_SEQUENTIAL, AREA_RANDOM},
		{MADV_RANDOM, AREA_RANDOM, AREA_SEQUENTIAL},
		{MADV_NORMAL, 0, AREA_RANDOM | AREA_SEQUENTIAL},
		{MADV_HWPOISON, AREA_EXCLUDED, 0},
	};

	for (size_t i = 0; i < sizeof(flags) / sizeof(flags[0]); i++)
		if (flags[i].advice == advice)
			area_change(start, end, flags[i].set, flags[i].clear, -1);
}

/* The kernel wipes no private mapping of a file on fork; a merged page is in such a mapping, and an island stays in it.
 * The agent wipes those itself. */
static int wipe_on_fork(uintptr_t start, uintptr_t end)
{
	uint64_t last = end >> PAGE_SHIFT, stop;
	int hole = 0;

	for (uint64_t vpn = start >> PAGE_SHIFT; vpn < last; vpn = stop) {
		bool merged = page_test(PAGE_SEGMENT, vpn);
		uintptr_t at = vpn << PAGE_SHIFT;

		stop = page_next(PAGE_SEGMENT, vpn, last, !merged);
		if (!merged && real.madvise((void *)at, (stop - vpn) << PAGE_SHIFT, MADV_WIPEONFORK)) {
			if (errno != ENOMEM)
				return -1;
			hole = ENOMEM;
		}
		area_change(at, stop << PAGE_SHIFT, AREA_WIPE, 0, -1);
	}
	errno = hole;
	return hole ? -1 : 0;
}

static int advise(uintptr_t start, uintptr_t end, int advice)
{
	int ret;

	switch (advice) {
	case MADV_DONTNEED:
	case MADV_DONTNEED_LOCKED:
	case MADV_FREE:
	case MADV_GUARD_INSTALL:
		return discard(start, end, advice);
	case MADV_WIPEONFORK:
		return wipe_on_fork(start, end);
	case MADV_REMOVE:
		ret = real.madvise((void *)start, end - start, advice);
		/* For anonymous memory the kernel says EINVAL, since there is no file to punch; for a private mapping
		 * of a file it says EACCES. */
		if (ret && errno == EACCES && has_segments(start, end))
			errno = EINVAL;
		return ret;
	default:
		ret = real.madvise((void *)start, end - start, advice);
		/* ENOMEM: a part is not mapped. The rest took the advice. */
		if (!ret || errno == ENOMEM)
			remember(start, end, advice);
		return ret;
	}
}

/* Before MADV_WIPEONFORK: from now on nothing in the range is merged, not even between this and the advice, nor if the
 * advice stops half-way. */
static int leave_alone(uintptr_t start, uintptr_t end)
{
	sigset_t saved;

	mmap_lock(&saved);
	area_change(start, end, AREA_EXCLUDED, 0, -1);
	mmap_unlock(&saved);
	return unmerge(start, end) == -ENOMEM;
}

int sp_madvise(void *addr, size_t len, int advice)
{
	bool merging = advice == MADV_MERGEABLE || advice == MADV_UNMERGEABLE;
	uintptr_t start = (uintptr_t)addr, end = PAGE_ALIGN_UP(start + len);
	bool nonsense = start % PAGE_SIZE || PAGE_ALIGN_UP(len) < len || end < start;
	int ret, before = errno;
	sigset_t saved;

	heed_watchers();
	merging = merging && (agent_may_come() || !no_areas());
	if (merging && nonsense) {
		errno = EINVAL;
		return -1;
	}
	/* With length 0, the call does nothing but tell whether the kernel knows the advice. */
	if ((no_areas() && !merging) || nonsense || (!merging && real.madvise(addr, 0, advice)))
		return real.madvise(addr, len, advice);
	if (start == end)
		return 0;
	if (merging)
		return merge_advice(start, end, advice);
	if (advice == MADV_WIPEONFORK && leave_alone(start, end)) {
		errno = ENOMEM;
		return -1;
	}
	for (int tries = 0;; tries++) {
		mmap_lock(&saved);
		if (area_overlaps(start, end))
			ret = advise(start, end, advice);
		else
			ret = real.madvise(addr, len, advice);
		mmap_unlock(&saved);
		if (!ret)
			errno = before; /* what libc's call leaves alone */
		/* EAGAIN: the kernel had no mapping left for a cut. */
		if (!ret || errno != EAGAIN || tries || !relieve_mappings())
			return ret;
	}
}

SP_EXPORT int madvise(void *addr, size_t len, int advice)
{
	return sp_madvise(addr, len, advice);
}
