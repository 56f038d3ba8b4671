/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The address-space lock. It protects the areas and the planes (area.h, planes.h), the reader of mappings (maps.h), the blocks
 * of alloc.c, the buffers of headroom.c, what is counted of stalls (stalls.h), and that nothing the agent looks at changes under it: every call that changes an area
 * is made with the lock held.
 *
 * An application thread takes it with all signals blocked, since a handler may call mprotect() too. The agent thread, which
 * has blocked them for good, yields it between steps while anybody waits.
 */
#ifndef SAMEPAGE_BASE_LOCK_H
#define SAMEPAGE_BASE_LOCK_H

#include "base/page.h"

#include <signal.h>

void mmap_lock(sigset_t *saved);
void mmap_unlock(const sigset_t *saved);
void agent_mmap_lock(void);
void agent_mmap_unlock(void);
/* For whoever may be either. `saved` is the application thread's. */
void any_mmap_lock(sigset_t *saved);
void any_mmap_unlock(const sigset_t *saved);
bool mmap_lock_contended(void);
void mmap_lock_reinit(void); /* in a forked child */
/* From now on `forked` is called in a child of a fork that passed no wrapper, as soon as it wants the lock: there is an agent
 * thread, which may have had it. */
void mmap_lock_watch(void (*forked)(void));
extern uint64_t mmap_lock_held; /* how often it was taken */

#endif
