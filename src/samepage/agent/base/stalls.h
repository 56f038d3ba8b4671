/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How often threads of the application were held up by the agent, and for how long: at a page that was out of its place, no longer
 * than it was; at the mmap_lock, while the agent's thread had it. All needs the lock.
 */
#ifndef SAMEPAGE_BASE_STALLS_H
#define SAMEPAGE_BASE_STALLS_H

#include "base/wire.h"

/* So many threads were held up, none for longer than `ns`. */
void stalls_note(unsigned threads, uint64_t ns);
/* Those since the last call. */
void stalls_take(struct sp_stalls *to);
/* What a forked child has of its parent's. */
void stalls_forget(void);

#endif
