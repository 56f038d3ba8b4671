/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How often, and for how long, the agent held up threads of the application. A thread waits at a page that is out of
 * its place, at most as long as the page is away; or at the mmap_lock while the agent's thread has it. Callers hold the
 * lock.
 */
#ifndef SAMEPAGE_BASE_STALLS_H
#define SAMEPAGE_BASE_STALLS_H

#include "base/wire.h"

/* Counts `threads` threads that were held up, none of them for longer than `ns`. */
void stalls_note(unsigned threads, uint64_t ns);
/* Hands out the counts since the last call. */
void stalls_take(struct sp_stalls *to);
/* Forgets, in a forked child, the parent's counts. */
void stalls_forget(void);

#endif
