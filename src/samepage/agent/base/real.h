/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The kernel's calls that change mappings, and those that all others go through.
 *
 * They are in a table so that tests can replace them (tests/agent/faults.c). The table is filled before any code runs.
 * Besides tests only hooks/watched.c changes it, when the agent is gone.
 */
#ifndef SAMEPAGE_BASE_REAL_H
#define SAMEPAGE_BASE_REAL_H

#include "base/page.h"

struct real {
	void *(*mmap)(void *, size_t, int, int, int, off_t);
	int (*munmap)(void *, size_t);
	void *(*mremap)(void *, size_t, size_t, int, ...);
	int (*mprotect)(void *, size_t, int);
	int (*madvise)(void *, size_t, int);
	int (*munlock)(const void *, size_t);
	int (*prctl)(int, ...);
	int (*ioctl)(int, unsigned long, ...);
	long (*syscall)(long, ...);
};
extern struct real real;

#endif
