/* SPDX-License-Identifier: Apache-2.0 */
/* Is there memory? All need the mmap_lock, for their buffers' sake, but online_cpus(). */
#ifndef SAMEPAGE_KERNEL_HEADROOM_H
#define SAMEPAGE_KERNEL_HEADROOM_H

#include "base/page.h"

/* Bytes this process could still be given before anybody would have to be killed: the least over its
 * memory cgroup, every ancestor, and MemAvailable. */
uint64_t headroom(bool with_swap);
/* Whether the last look found 0 because something that may hold a limit could not be read. */
bool headroom_unknown(void);
/* Whether `bytes` can be taken and `leave` bytes are left then. Where there is plenty it does not look every time. */
bool room_for(uint64_t bytes, uint64_t leave);
/* The same for what merging takes before it gives more back, and looking, which is for nothing else: half of the reserve is
 * left, so that memory that an unmerge left scarce can be merged again. */
bool room_to_merge(uint64_t bytes);
unsigned long online_cpus(void);

#endif
