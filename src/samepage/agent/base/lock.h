/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The address-space lock. It protects the areas and the planes (area.h, planes.h), the reader of mappings (maps.h), the
 * blocks of alloc.c, the buffers of headroom.c and the stall counts (stalls.h). While it is held, nothing the agent
 * looks at changes: every call that changes an area is made with the lock held.
 *
 * An application thread takes it with all signals blocked, since a signal handler may call mprotect() too. The agent
 * thread always has its signals blocked; between steps it yields the lock if anybody waits.
 */
#ifndef SAMEPAGE_BASE_LOCK_H
#define SAMEPAGE_BASE_LOCK_H

#include "base/page.h"

#include <signal.h>

void mmap_lock(sigset_t *saved);
/* The same for a fork: if the agent waits for the lock, it has its turn first, within a tenth of a second. */
void mmap_lock_for_fork(sigset_t *saved);
void mmap_unlock(const sigset_t *saved);
void agent_mmap_lock(void);
void agent_mmap_unlock(void);
/* For code that may run on either kind of thread. Only an application thread uses `saved`. */
void any_mmap_lock(sigset_t *saved);
void any_mmap_unlock(const sigset_t *saved);
bool mmap_lock_contended(void);
void mmap_lock_reinit(void); /* in a forked child */
/* From now on, a child of a fork that passed no wrapper calls `forked` when it next takes the lock. The agent thread,
 * which does not exist in the child, may have held the lock at the fork. */
void mmap_lock_watch(void (*forked)(void));
extern uint64_t mmap_lock_held; /* how often it was taken */

#endif
