/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Unmerging what the kernel's KSM merged, in a process's name, without ever waking the OOM killer.
 *
 * MADV_UNMERGEABLE copies all merged pages of a range, whatever there is: in a memory cgroup that is full the first copy too many
 * ends in the OOM killer. So the range is cut into batches, and before each it is looked whether the memory is there
 * (headroom.c), with the process held already, so that as little as can be lies between the look and the copies.
 * If it is not there: ENOMEM, and nothing is asked of the kernel.
 *
 * The kernel takes VM_MERGEABLE off a range only when all of it was copied. So at each moment memory with merged pages is
 * mergeable, and what is not has none. With `keep` each batch is made mergeable again at once.
 */
#define _GNU_SOURCE
#include "inject.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

#define NEAR_STEP (256UL << 10) /* near the limit: copied after one look */
#define NEAR_EACH (32ULL << 20) /* near: less than this, and the reserve, for each CPU that could take it meanwhile */
#define OVERHEAD (256ULL << 10) /* more than the kernel needs for page tables and mappings */

/* Addresses of one mapping, and how many bytes of it are merged at most. */
struct range {
	uint64_t start, end, merged;
};

struct unmerging {
	/* asked */
	pid_t pid;
	int pidfd;
	const struct range *range;
	uint64_t n, reserve, hold_ns;
	uint64_t keep;
	/* answered */
	uint64_t done; /* ranges that are finished */
	uint64_t needed, available;
	int64_t error; /* an errno; EAGAIN: the process was held for long enough, call again with the rest */
	uint64_t unseen;
};

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

/* Whether there is memory for a batch. 0 or ENOMEM. *near: others could take it while it is being copied. */
static int look(struct unmerging *u, uint64_t bytes, bool *near)
{
	bool unseen;

	u->needed = bytes + OVERHEAD + u->reserve;
	u->available = headroom_of(u->pid, &unseen);
	u->unseen = unseen;
	*near = u->available < u->needed + NEAR_EACH * (uint64_t)sysconf(_SC_NPROCESSORS_ONLN);
	return u->available < u->needed ? ENOMEM : 0;
}

static enum inject_error advise(struct tracee *t, uint64_t start, uint64_t end, int advice, int64_t *err)
{
	struct inject_call call = {SYS_madvise, {start, end - start, (uint64_t)advice}, 0};
	enum inject_error failed = make_call(t, &call);

	/* A signal that is waiting interrupts it: what was copied is copied. */
	*err = call.ret == -RESTART_SYSCALL || call.ret == -EINTR ? EAGAIN : -call.ret;
	return failed;
}

/* One batch of one range. */
static enum inject_error unmerge_batch(struct unmerging *u, struct tracee *t, uint64_t start, uint64_t end)
{
	enum inject_error failed = advise(t, start, end, MADV_UNMERGEABLE, &u->error);
	int64_t ignored;

	if (!failed && !u->error && u->keep)
		failed = advise(t, start, end, MADV_MERGEABLE, &ignored);
	return failed;
}

static enum inject_error unmerge_range(struct unmerging *u, struct tracee *t, const struct range *r)
{
	enum inject_error failed = INJECT_OK;
	uint64_t at = r->start;
	bool near;

	u->error = look(u, r->merged, &near);
	if (!u->error && !near)
		return unmerge_batch(u, t, r->start, r->end);
	/* A part of it may still go. */
	while (!failed && at < r->end) {
		uint64_t end = r->end - at < NEAR_STEP ? r->end : at + NEAR_STEP;

		u->error = look(u, end - at < r->merged ? end - at : r->merged, &near);
		if (u->error)
			break;
		failed = unmerge_batch(u, t, at, end);
		if (u->error)
			break;
		at = end;
	}
	return failed;
}

static enum inject_error unmerge(void *arg)
{
	static __thread struct tracee t;
	struct unmerging *u = arg;
	uint64_t until;
	enum inject_error err;

	t = (struct tracee){.pid = u->pid, .pidfd = u->pidfd};
	err = begin(&t);
	until = now_ns() + u->hold_ns;
	for (; !err && u->done < u->n; u->done++) {
		if (now_ns() > until) {
			u->error = EAGAIN;
			break;
		}
		err = unmerge_range(u, &t, &u->range[u->done]);
		if (u->error)
			break;
	}
	if (!err)
		err = end(&t);
	forget(&t);
	return err;
}

/* enum inject_error, and the rest in *u. */
EXPORT int samepage_inject_unmerge(struct unmerging *u)
{
	bool near;

	u->done = 0;
	/* To hold a process may take a page of its stack. */
	u->error = look(u, 0, &near);
	return u->error ? INJECT_OK : (int)on_own_thread(unmerge, u);
}

/* What there is for a process, and whether that is known. */
EXPORT uint64_t samepage_inject_headroom(pid_t pid, int *unseen)
{
	bool not_seen;
	uint64_t bytes = headroom_of(pid, &not_seen);

	*unseen = not_seen;
	return bytes;
}
