/* SPDX-License-Identifier: Apache-2.0 */
/* The lock that keeps areas still. */
#include "agent.h"

#include <pthread.h>
#include <sys/syscall.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static _Atomic int waiters; /* application threads that want the lock */

void mmap_lock(sigset_t *saved)
{
	sigset_t all;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, saved);
	if (pthread_mutex_trylock(&lock)) {
		atomic_fetch_add(&waiters, 1);
		pthread_mutex_lock(&lock);
		atomic_fetch_sub(&waiters, 1);
	}
}

void mmap_unlock(const sigset_t *saved)
{
	check_books();
	area_trim();
	pthread_mutex_unlock(&lock);
	pthread_sigmask(SIG_SETMASK, saved, NULL);
}

void agent_mmap_lock(void)
{
	/* A mutex that is let go and retaken at once never reaches a sleeper: stand back while one waits. */
	while (atomic_load_explicit(&waiters, memory_order_relaxed))
		real.syscall(SYS_sched_yield);
	pthread_mutex_lock(&lock);
}

void agent_mmap_unlock(void)
{
	check_books();
	pthread_mutex_unlock(&lock);
}

bool mmap_lock_contended(void)
{
	return atomic_load_explicit(&waiters, memory_order_relaxed);
}

void mmap_lock_reinit(void)
{
	pthread_mutex_init(&lock, NULL);
	atomic_store(&waiters, 0);
}
