/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A thread for an operation, which is given up when it takes too long. It reads and writes memory of another process,
 * and the kernel waits there for as long as whoever serves that memory likes (FUSE, userfaultfd): only the end of this
 * process ends such a wait. A thread that was given up makes no more calls if it ever goes on.
 */
#define _GNU_SOURCE
#include "inject.h"

#include "arch/arch.h"
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define LONGEST_NS 15000000000ULL /* all waits of trace.c and settle.c together are shorter */

/* Until glibc 2.34 these were in libpthread. Those versions of them are in both. */
__asm__(".symver pthread_create, pthread_create@" ARCH_LIBC);
__asm__(".symver pthread_join, pthread_join@" ARCH_LIBC);
__asm__(".symver pthread_sigmask, pthread_sigmask@" ARCH_LIBC);

struct job {
	enum inject_error (*work)(void *);
	void *what;
	enum inject_error err;
	_Atomic uint32_t done;
	_Atomic bool given_up;
};

static __thread struct job *mine;

bool given_up(void)
{
	return mine && atomic_load(&mine->given_up);
}

uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static void *run(void *arg)
{
	mine = arg;
	mine->err = mine->work(mine->what);
	atomic_store(&mine->done, 1);
	syscall(SYS_futex, &mine->done, FUTEX_WAKE, 1, NULL, NULL, 0);
	return NULL;
}

static bool is_done_in_time(struct job *job)
{
	uint64_t until = now_ns() + LONGEST_NS;

	while (!atomic_load(&job->done) && now_ns() < until)
		syscall(SYS_futex, &job->done, FUTEX_WAIT, 0, &(struct timespec){0, 100000000}, NULL, 0);
	return atomic_load(&job->done);
}

static bool start(pthread_t *thread, struct job *job)
{
	sigset_t all, saved;
	int failed;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &saved);
	failed = pthread_create(thread, NULL, run, job);
	pthread_sigmask(SIG_SETMASK, &saved, NULL);
	return !failed;
}

enum inject_error on_own_thread(enum inject_error (*work)(void *), void *what)
{
	struct job *job = calloc(1, sizeof(*job));
	enum inject_error err = INJECT_FAILED;
	pthread_t thread;

	if (!job)
		return err;
	job->work = work;
	job->what = what;
	if (start(&thread, job)) {
		if (!is_done_in_time(job)) {
			atomic_store(&job->given_up, true);
			return INJECT_STUCK; /* the thread has `job` and `what` for good */
		}
		pthread_join(thread, NULL);
		err = job->err;
	}
	free(job);
	return err;
}
