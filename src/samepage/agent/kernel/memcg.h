/* SPDX-License-Identifier: Apache-2.0 */
/* The process's memory cgroup and the kernel's files about it, which headroom.c evaluates. Callers hold the
 * mmap_lock. */
#ifndef SAMEPAGE_KERNEL_MEMCG_H
#define SAMEPAGE_KERNEL_MEMCG_H

#include "base/page.h"

#include <fcntl.h>
#include <limits.h>
#include <time.h>
#include <unistd.h>

#define NO_LIMIT UINT64_MAX

/* Where the kernel's files are; tests use files of their own. `prefix` is put before every mount point. */
struct roots {
	const char *cgroup, *thread_cgroup, *namespace, *mountinfo, *meminfo, *swappiness, *prefix;
};

/* The process's memory cgroup, as found. */
struct memcg {
	char own[PATH_MAX]; /* its path in /proc/self/cgroup; when that changes, the rest is out of date */
	char dir[PATH_MAX]; /* its directory, or "". Its ancestors' directories are prefixes of it, of at least `top`
			     * bytes */
	size_t top;
	bool v2;
	time_t found; /* CLOCK_MONOTONIC, seconds */
};
extern struct memcg memcg;

/* A file that may hold a limit could not be read. A file that does not exist does not set it. */
extern bool blind;

/* Finds the cgroup's directory: again whenever the process has moved, and once a second, since mounts come and go.
 * Returns whether it searched. */
bool memcg_locate(const struct roots *r);
/* Whether a path like memcg.own is that of a removed cgroup. */
bool memcg_is_gone(const char *path);

/* All names are relative to the directory `dir`, which may be AT_FDCWD. */
int open_at(int dir, const char *name, int flags);
/* Reads the whole file, for field(). */
bool read_at(int dir, const char *name);
/* The number after `key` in the file last read, or `otherwise`. */
uint64_t field(const char *key, uint64_t otherwise);
/* Reads a file that holds one number of bytes, or "max". Returns `otherwise` if it cannot be read. */
uint64_t number_at(int dir, const char *name, uint64_t otherwise);

#endif
