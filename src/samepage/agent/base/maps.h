/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the kernel has mapped, as /proc/PID/maps says. All need the mmap_lock, which the reader's position belongs to, but
 * vma_prot(), vma_count() and vma_limit().
 */
#ifndef SAMEPAGE_BASE_MAPS_H
#define SAMEPAGE_BASE_MAPS_H

#include "base/page.h"

/* What it says of one mapping. */
struct vma {
	uintptr_t start, end;
	uint64_t offset, ino; /* offset in bytes */
	uint64_t dev;	      /* as /proc/self/maps has it: of 32 bits each */
	bool read, write, exec, shared;
};
/* The device of segments, as soon as one was merged with. */
extern uint64_t segment_dev;
static inline bool vma_is_segment(const struct vma *v)
{
	return v->ino && v->dev == segment_dev && !v->shared;
}

int maps_open(void); /* /proc/thread-self/maps, or -errno; no cancellation point, unlike open(2) */
void maps_close(int file);
int vma_prot(const struct vma *v);
/* The first mapping that ends after `addr`; false when there is none. `file` is an open maps file. */
bool vma_find(int file, uintptr_t addr, struct vma *out);
void vma_forget(void); /* an open file is another from now on */
/* If nobody held the lock since it was last held here, no mapping changed that vma_find() is asked for. */
void vma_resume(void);
/* How many mappings the process has; *segments: of them of segments. The agent thread only. */
unsigned long vma_count(unsigned long *segments);
/* How many it may have: vm.max_map_count. The agent thread only. */
unsigned long vma_limit(void);

#endif
