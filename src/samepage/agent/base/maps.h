/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the kernel has mapped, as /proc/PID/maps says. Callers hold the mmap_lock, which protects the reader's position;
 * vma_prot(), vma_count() and vma_limit() need no lock.
 */
#ifndef SAMEPAGE_BASE_MAPS_H
#define SAMEPAGE_BASE_MAPS_H

#include "base/page.h"

/* One mapping. */
struct vma {
	uintptr_t start, end;
	uint64_t offset, ino; /* offset in bytes */
	uint64_t dev;	      /* as in /proc/self/maps: major and minor, 32 bits each */
	bool read, write, exec, shared;
};
/* The device that segments are on; 0 until the first one was merged with. */
extern uint64_t segment_dev;
static inline bool vma_is_segment(const struct vma *v)
{
	return v->ino && v->dev == segment_dev && !v->shared;
}

int maps_open(void); /* opens /proc/thread-self/maps, or returns -errno; unlike open(2) no cancellation point */
void maps_close(int file);
int vma_prot(const struct vma *v);
/* The first mapping that ends after `addr`; false when there is none. `file` is an open maps file. */
bool vma_find(int file, uintptr_t addr, struct vma *out);
void vma_forget(void); /* call after opening another maps file, or after mappings changed */
/* Lets vma_find() go on where it stopped, although the lock was released, if nobody else held it meanwhile. The
 * mappings it is asked for must not have changed. */
void vma_resume(void);
/* How many mappings the process has, and in *segments how many of them are of segments. Agent thread only. */
unsigned long vma_count(unsigned long *segments);
/* How many mappings it may have: vm.max_map_count. Agent thread only. */
unsigned long vma_limit(void);

#endif
