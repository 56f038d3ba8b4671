/* SPDX-License-Identifier: Apache-2.0 */
/* The lock that keeps areas from changing. */
#include "base/lock.h"
#include "base/area.h"
#include "base/check.h"
#include "base/descriptors.h"
#include "base/page.h"
#include "base/real.h"
#include "base/stalls.h"
#include "base/system.h"

#include <sys/mman.h>

static struct mutex lock;
static _Atomic int waiters; /* application threads that want the lock */
static _Atomic bool agent_has_it;
static _Atomic uint32_t agent_waits; /* 1: for the lock. Others wait on it for the agent's turn. */
static uint64_t fork_began;	     /* ns; under the lock */
static _Atomic uint64_t fork_took;   /* ns, the last one */
uint64_t mmap_lock_held;

/*
 * In a page that the kernel clears in a forked child. 0: this process is such a child, of a fork that passed no wrapper
 * (an inline system call). The agent thread, which does not exist here, may have held the lock at the fork.
 */
static _Atomic uint32_t *here;
static void (*when_forked)(void);

void mmap_lock_watch(void (*forked)(void))
{
	void *page = here ? MAP_FAILED
			  : real.mmap(NULL, PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (page == MAP_FAILED)
		return;
	if (real.madvise(page, PAGE_SIZE, MADV_WIPEONFORK)) { /* 4.14 */
		real.munmap(page, PAGE_SIZE);
		return;
	}
	atomic_store((_Atomic uint32_t *)page, 1);
	when_forked = forked;
	here = page;
}

static void wait_for_lock(void)
{
	bool agents = atomic_load_explicit(&agent_has_it, memory_order_relaxed);
	uint64_t began = agents ? now_ns() : 0;

	atomic_fetch_add(&waiters, 1);
	mutex_lock(&lock);
	atomic_fetch_sub(&waiters, 1);
	if (agents)
		stalls_note(1, now_ns() - began);
}

static void note_child(void)
{
	if (here && __builtin_expect(!atomic_load_explicit(here, memory_order_relaxed), 0))
		when_forked();
}

static void lock_now(void)
{
	if (!mutex_trylock(&lock))
		wait_for_lock();
	mmap_lock_held++;
}

void mmap_lock(sigset_t *saved)
{
	block_signals(saved);
	note_child();
	lock_now();
}

#define TURN_MAX_NS 100000000UL

/*
 * A fork of a process with many mappings takes tenths of a second. If the application forks again at once, the agent,
 * which sleeps until the lock is free, finds it taken each time that it wakes. So a fork for which the agent would have to
 * wait once more waits itself until the agent has had the lock, for as long as the fork before took, at most. (That may end
 * first: the agent may not get a CPU.)
 */
void mmap_lock_for_fork(sigset_t *saved)
{
	uint64_t took = atomic_load(&fork_took), waited = 0;
	const struct timespec turn = {.tv_nsec = (long)(took < TURN_MAX_NS ? took : TURN_MAX_NS)};

	block_signals(saved);
	note_child();
	if (atomic_load(&agent_waits)) {
		waited = now_ns();
		futex_wait(&agent_waits, 1, &turn);
		waited = now_ns() - waited;
	}
	lock_now();
	if (waited)
		stalls_note(1, waited);
	fork_began = now_ns();
}

void mmap_unlock(const sigset_t *saved)
{
	check_books();
	if (fork_began)
		atomic_store(&fork_took, now_ns() - fork_began);
	fork_began = 0;
	area_trim();
	mutex_unlock(&lock);
	pthread_sigmask(SIG_SETMASK, saved, NULL);
}

#define STAND_BACK_MS 4

/* If the agent releases a mutex and retakes it at once, a sleeper never gets it. So yield while somebody waits. There may
 * always be somebody, so this is limited: by time, since each yield lasts some milliseconds if more threads want to run than
 * there are CPUs. */
static void stand_back(void)
{
	int64_t ends = 0;

	while (atomic_load_explicit(&waiters, memory_order_relaxed)) {
		if (!ends)
			ends = now_ms() + STAND_BACK_MS;
		else if (now_ms() >= ends)
			return;
		real.syscall(SYS_sched_yield);
	}
}

void agent_mmap_lock(void)
{
	stand_back();
	if (!mutex_trylock(&lock)) {
		atomic_store(&agent_waits, 1);
		mutex_lock(&lock);
		atomic_store(&agent_waits, 0);
		futex_wake(&agent_waits);
	}
	atomic_store_explicit(&agent_has_it, true, memory_order_relaxed);
	mmap_lock_held++;
	descriptors_are_ours(); /* if they are not, this forgets them, so that the step uses none */
}

void agent_mmap_unlock(void)
{
	check_books();
	atomic_store_explicit(&agent_has_it, false, memory_order_relaxed);
	mutex_unlock(&lock);
}

void any_mmap_lock(sigset_t *saved)
{
	if (on_agent_thread())
		agent_mmap_lock();
	else
		mmap_lock(saved);
}

void any_mmap_unlock(const sigset_t *saved)
{
	if (on_agent_thread())
		agent_mmap_unlock();
	else
		mmap_unlock(saved);
}

bool mmap_lock_contended(void)
{
	return atomic_load_explicit(&waiters, memory_order_relaxed);
}

void mmap_lock_reinit(void)
{
	lock = (struct mutex){0};
	atomic_store(&waiters, 0);
	atomic_store(&agent_has_it, false);
	atomic_store(&agent_waits, 0);
	fork_began = 0;
	stalls_forget();
	if (here)
		atomic_store(here, 1);
}
