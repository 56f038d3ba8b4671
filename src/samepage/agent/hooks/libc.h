/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The functions behind the wrappers, as the next object in the search order has them. The application's calls go there,
 * so that other libraries in front of libc see them, too. The agent's own calls go to the kernel (base/real.h).
 *
 * The first thread that needs the table fills it; after that it is only read.
 */
#ifndef SAMEPAGE_HOOKS_LIBC_H
#define SAMEPAGE_HOOKS_LIBC_H

#include "base/page.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>

/* Until glibc 2.34 dlsym() was in libdl. That version of it is in both, so the agent loads with older ones, too. */
__asm__(".symver dlsym, dlsym@" ARCH_LIBC);

extern _Atomic bool next_ready;

extern struct next {
	void *(*malloc)(size_t);
	void (*free)(void *);
	void *(*calloc)(size_t, size_t);
	void *(*realloc)(void *, size_t);
	int (*posix_memalign)(void **, size_t, size_t);
	void *(*aligned_alloc)(size_t, size_t);
	void *(*memalign)(size_t, size_t);
	size_t (*malloc_usable_size)(void *);
	int (*malloc_trim)(size_t);
	int (*mallopt)(int, int);
	void *(*mmap)(void *, size_t, int, int, int, off_t);
	int (*munmap)(void *, size_t);
	void *(*mremap)(void *, size_t, size_t, int, ...);
	int (*madvise)(void *, size_t, int);
	int (*mlock)(const void *, size_t);
	int (*munlock)(const void *, size_t);
	int (*mlockall)(int);
	int (*munlockall)(void);
	pid_t (*_Fork)(void);
	int (*clone)(int (*)(void *), void *, int, void *, ...);
	int (*unshare)(int);
	int (*setns)(int, int);
	int (*prctl)(int, ...);
	int (*ioctl)(int, unsigned long, ...);
	long (*syscall)(long, ...);
	void *(*shmat)(int, const void *, int);
	int (*brk)(void *);
	void *(*sbrk)(intptr_t);
	/* What pthread_atfork() calls. We wrap it so that our handlers are registered first. */
	int (*register_atfork)(void (*)(void), void (*)(void), void (*)(void), void *);
	int (*chroot)(const char *);
	int (*setuid)(uid_t);
	int (*seteuid)(uid_t);
	int (*setreuid)(uid_t, uid_t);
	int (*setresuid)(uid_t, uid_t, uid_t);
	int (*setgid)(gid_t);
	int (*setegid)(gid_t);
	int (*setregid)(gid_t, gid_t);
	int (*setresgid)(gid_t, gid_t, gid_t);
	int (*setgroups)(size_t, const gid_t *);
	int (*initgroups)(const char *, gid_t);
	int (*setfsuid)(uid_t);
	int (*setfsgid)(gid_t);
	int (*capset)(void *, void *);
	int (*pthread_mutex_init)(pthread_mutex_t *, const pthread_mutexattr_t *);
	int (*pthread_mutexattr_getrobust)(const pthread_mutexattr_t *, int *);
	int (*pthread_mutexattr_getprotocol)(const pthread_mutexattr_t *, int *);
	int (*pthread_attr_setstack)(pthread_attr_t *, void *, size_t);
	int (*pthread_attr_setstackaddr)(pthread_attr_t *, void *);
} next;

/* Fills `next`. Safe to call from anywhere, also from inside malloc while dlsym runs. */
void next_init(void);

static inline void need_next(void)
{
	if (__builtin_expect(!atomic_load_explicit(&next_ready, memory_order_acquire), 0))
		next_init();
}

#endif
