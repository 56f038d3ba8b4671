/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the kernel reads and writes when a thread ends: the thread's number on its stack, which pthread_join() waits for
 * (CLONE_CHILD_CLEARTID); the list of its robust mutexes, which begins there too; and the mutexes. A thread that ends
 * cannot wait for a page (handle_userfault() refuses under PF_EXITING), and the kernel reports no error if a page is
 * missing: a thread that joins it, or wants such a mutex, would wait for ever. So these pages are never moved.
 */
#include "hooks/hooks.h"

#define LIBCS_MAX (64UL << 10)

void left_in_place(const void *p, size_t len)
{
	uintptr_t start = PAGE_ALIGN_DOWN(p), end = PAGE_ALIGN_UP((uintptr_t)p + len);
	bool ours, merged;
	sigset_t saved;

	if (!p || start >= end || no_areas())
		return;
	mmap_lock(&saved);
	ours = area_overlaps(start, end);
	merged = ours && has_segments(start, end);
	if (ours)
		area_change(start, end, AREA_EXCLUDED, 0, -1);
	mmap_unlock(&saved);
	/* If there is no memory for copies, they stay merged, and in place. */
	if (merged)
		unmerge(start, end);
}

SP_EXPORT int pthread_mutex_init(pthread_mutex_t *mutex, const pthread_mutexattr_t *attr)
{
	int robust = PTHREAD_MUTEX_STALLED, protocol = PTHREAD_PRIO_NONE;

	need_next();
	if (attr && next.pthread_mutexattr_getrobust && !next.pthread_mutexattr_getrobust(attr, &robust) &&
	    robust == PTHREAD_MUTEX_ROBUST)
		left_in_place(mutex, sizeof(*mutex));
	else if (attr && next.pthread_mutexattr_getprotocol && !next.pthread_mutexattr_getprotocol(attr, &protocol) &&
		 protocol == PTHREAD_PRIO_INHERIT) /* whose word the kernel writes: sp_futex() in wrappers.c */
		left_in_place(mutex, sizeof(*mutex));
	return next.pthread_mutex_init(mutex, attr);
}

SP_EXPORT int pthread_attr_setstack(pthread_attr_t *attr, void *stack, size_t len)
{
	int err;

	need_next();
	err = next.pthread_attr_setstack(attr, stack, len);
	if (!err)
		left_in_place(stack, len);
	return err;
}

/* The older call, which says where a stack ends but not where it begins. What the kernel writes is libc's, at the end: libc's words of the
 * thread, and thread-local variables before or behind them. */
SP_EXPORT int pthread_attr_setstackaddr(pthread_attr_t *attr, void *end)
{
	need_next();
	left_in_place((char *)end - LIBCS_MAX, LIBCS_MAX);
	return next.pthread_attr_setstackaddr(attr, end); /* musl has none, and nobody there calls it */
}
