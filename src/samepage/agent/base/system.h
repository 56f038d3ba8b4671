/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The kernel, reached by the agent's own instruction, and a lock made of nothing else.
 *
 * The agent's thread is not one that libc knows (thread.c), and agent code runs inside malloc, inside dlopen and inside
 * signal handlers. So the agent calls no libc function that somebody may replace, hold a lock of, or be inside of. The
 * functions it uses under libc's names are defined in system.c, hidden, and the library imports none of them
 * (tests/agent/test_start.py).
 */
#ifndef SAMEPAGE_BASE_SYSTEM_H
#define SAMEPAGE_BASE_SYSTEM_H

#include "base/page.h"

#include <linux/futex.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <sys/types.h>
#include <time.h>

/* Reads the arguments after `last` of a variadic function into the array `a`. It may read more than the caller gave,
 * which does no harm: a system call uses only the arguments it has. */
#define ARGUMENTS(a, last)                                                                                             \
	do {                                                                                                           \
		va_list args_;                                                                                         \
		va_start(args_, last);                                                                                 \
		for (size_t i_ = 0; i_ < sizeof(a) / sizeof((a)[0]); i_++)                                             \
			(a)[i_] = va_arg(args_, __typeof__((a)[0]));                                                   \
		va_end(args_);                                                                                         \
	} while (0)

/* raw_syscall() with syscall(2)'s convention: -1 and errno. */
long kernel_syscall(long number, ...);

/* Whether the kernel could read all of it, at least 8 bytes. What the application passes to a system call may be any
 * address, for which the kernel has EFAULT. */
bool is_readable(const void *p, size_t len);

/* Reads the start of a file. Returns how many bytes it read, or -errno. */
ssize_t read_file(const char *path, char *buf, size_t size);
int64_t now_ms(void); /* CLOCK_MONOTONIC */
uint64_t now_ns(void);
uint64_t thread_cpu_ns(void);

/* Blocks all signals, libc's own too. */
static inline void block_signals(sigset_t *saved)
{
	sigset_t all;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, saved);
}

/* Sleeps while *word is `value`, until a wake comes or the timeout is over. */
static inline void futex_wait(_Atomic uint32_t *word, uint32_t value, const struct timespec *timeout)
{
	raw_syscall(SYS_futex, (long)word, FUTEX_WAIT, value, (long)timeout, 0, 0);
}

static inline void futex_wake(_Atomic uint32_t *word)
{
	raw_syscall(SYS_futex, (long)word, FUTEX_WAKE, INT32_MAX, 0, 0, 0);
}

/*
 * libc's mutexes leave out their atomic instructions in a process in which libc knows of only one thread, so they would
 * not keep the agent's thread out. This one doesn't, and it does not sleep inside libc.
 */
struct mutex {
	_Atomic uint32_t word; /* 0: free, 1: held, 2: held, and somebody may sleep */
};

static inline bool mutex_trylock(struct mutex *m)
{
	uint32_t free = 0;

	return atomic_compare_exchange_strong_explicit(&m->word, &free, 1, memory_order_acquire, memory_order_relaxed);
}

static inline void mutex_lock(struct mutex *m)
{
	if (mutex_trylock(m))
		return;
	while (atomic_exchange_explicit(&m->word, 2, memory_order_acquire))
		futex_wait(&m->word, 2, NULL);
}

static inline void mutex_unlock(struct mutex *m)
{
	if (atomic_exchange_explicit(&m->word, 0, memory_order_release) == 2)
		raw_syscall(SYS_futex, (long)&m->word, FUTEX_WAKE, 1, 0, 0, 0);
}

#endif
