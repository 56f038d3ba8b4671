/* SPDX-License-Identifier: Apache-2.0 */
/* The process's memory cgroup and the kernel's files about it: what headroom.c adds up. Needs the mmap_lock. */
#ifndef SAMEPAGE_KERNEL_MEMCG_H
#define SAMEPAGE_KERNEL_MEMCG_H

#include "base/page.h"

#include <fcntl.h>
#include <limits.h>
#include <time.h>
#include <unistd.h>

#define NO_LIMIT UINT64_MAX

/* Where the kernel's files are; tests have their own. `prefix` goes before every mount point. */
struct roots {
	const char *cgroup, *thread_cgroup, *namespace, *mountinfo, *meminfo, *swappiness, *prefix;
};

/* The process's memory cgroup, as found. */
struct memcg {
	char own[PATH_MAX]; /* its path as /proc/self/cgroup has it: when that changes, all of this is old */
	char dir[PATH_MAX]; /* its directory; those of its ancestors are what it begins with, down to `top` bytes; "": none */
	size_t top;
	bool v2;
	time_t found; /* CLOCK_MONOTONIC, seconds */
};
extern struct memcg memcg;

/* Something that may hold a limit could not be read. What is just not there does not set it. */
extern bool blind;

/* Finds the cgroup's directory, anew when the process has moved and once a second besides: mounts come and go. Returns
 * whether it did so. */
bool memcg_locate(const struct roots *r);
/* Whether a path as in memcg.own is of a cgroup that has been removed. */
bool memcg_is_gone(const char *path);

/* All relative to the directory `dir`, which may be AT_FDCWD. */
int open_at(int dir, const char *name, int flags);
/* Reads the whole file, for field(). */
bool read_at(int dir, const char *name);
/* The number after `key` in the file last read, or `otherwise`. */
uint64_t field(const char *key, uint64_t otherwise);
/* A file that holds one number of bytes, or "max"; `otherwise` when it cannot be read. */
uint64_t number_at(int dir, const char *name, uint64_t otherwise);

#endif
