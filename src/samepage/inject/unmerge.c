/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Unmerges what the kernel's KSM merged, in the name of a process, without ever waking the OOM killer.
 *
 * MADV_UNMERGEABLE copies all merged pages of a range, however little memory there is: in a full memory cgroup, the
 * first copy too many ends in the OOM killer. So the range is cut into batches, and before each batch headroom.c looks
 * whether the memory is there. The process is held already by then, so that as little time as possible passes between
 * the look and the copies. If the memory is not there, the answer is ENOMEM, and the kernel is not asked.
 *
 * The kernel clears VM_MERGEABLE of a range only when all of it was copied. So at each moment memory with merged pages
 * is mergeable, and memory that is not mergeable has no merged pages. With `keep`, each batch is made mergeable again
 * at once.
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

#define NEAR_STEP (256UL << 10) /* near the limit: bytes copied after one look */
#define NEAR_EACH (32ULL << 20) /* near the limit: less than this for each CPU, beside the reserve */
#define OVERHEAD (256ULL << 10) /* more than the kernel takes for page tables and mappings */

/* Addresses within one mapping, and how many bytes of it are merged at most. */
struct range {
	uint64_t start, end, merged;
};

struct unmerging {
	/* asked */
	pid_t pid;
	int pidfd;
	struct range *range;
	uint64_t n, reserve, hold_ns;
	uint64_t keep;
	/* answered */
	uint64_t done; /* ranges that are finished */
	uint64_t needed, available;
	int64_t error; /* an errno; EAGAIN: the process was held long enough, call again with the rest */
	uint64_t unseen;
};

/* Whether there is memory for a batch. Returns 0 or ENOMEM. *near: others could take the memory during the copy. */
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

	/* A pending signal interrupts the call; what was copied stays copied. */
	*err = call.ret == -RESTART_SYSCALL || call.ret == -EINTR ? EAGAIN : -call.ret;
	return failed;
}

/* Unmerges one batch of one range. */
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
	/* A part of the range may still go. */
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

/* As unmerge(), of a copy that stays when it is given up. */
static enum inject_error unmerge_copy(struct unmerging *u)
{
	struct unmerging *copy = malloc(sizeof(*copy) + u->n * sizeof(*u->range));
	struct range *range = u->range;
	enum inject_error err;

	if (!copy)
		return INJECT_FAILED;
	*copy = *u;
	copy->range = memcpy(copy + 1, range, u->n * sizeof(*range));
	err = on_own_thread(unmerge, copy);
	if (err == INJECT_STUCK)
		return err;
	*u = *copy;
	u->range = range;
	free(copy);
	return err;
}

/* Returns an enum inject_error; the rest of the answer is in *u. */
EXPORT int samepage_inject_unmerge(struct unmerging *u)
{
	bool near;

	u->done = 0;
	/* Holding a process may take a page of its stack. */
	u->error = look(u, 0, &near);
	return u->error ? INJECT_OK : unmerge_copy(u);
}

/* How much memory there is for a process, and whether that is known. */
EXPORT uint64_t samepage_inject_headroom(pid_t pid, int *unseen)
{
	bool not_seen;
	uint64_t bytes = headroom_of(pid, &not_seen);

	*unseen = not_seen;
	return bytes;
}
