/* SPDX-License-Identifier: Apache-2.0 */
/* Is there memory? Callers hold the mmap_lock, which protects static buffers; online_cpus() needs no lock. */
#ifndef SAMEPAGE_KERNEL_HEADROOM_H
#define SAMEPAGE_KERNEL_HEADROOM_H

#include "base/page.h"

/* How many bytes this process could still be given before anybody would have to be killed: the least over its memory
 * cgroup, every ancestor, and MemAvailable. */
uint64_t headroom(bool with_swap);
/* Whether the last headroom() was 0 because a file that may hold a limit could not be read. */
bool headroom_unknown(void);
/* Whether `bytes` can be taken with `leave` bytes left. If there is plenty, it does not read the files every time. */
bool room_for(uint64_t bytes, uint64_t leave);
/* The same, for memory that merging takes before it gives more back, and for looks, which serve merging only. It leaves
 * only half of the reserve, so that merging can start again after an unmerge left memory scarce. */
bool room_to_merge(uint64_t bytes);
unsigned long online_cpus(void);

#endif
