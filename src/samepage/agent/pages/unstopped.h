/* SPDX-License-Identifier: Apache-2.0 */
/* Steps that nobody stops half way; the agent thread only, or the child that makes one for it. */
#ifndef SAMEPAGE_PAGES_UNSTOPPED_H
#define SAMEPAGE_PAGES_UNSTOPPED_H

#include "base/page.h"

/* Runs fn(arg) on behalf of the agent thread, which cannot be stopped meanwhile. False: it was killed in the middle. */
bool run_unstopped(void (*fn)(void *), void *arg);
/* Whether the agent thread woke since, for the process is ending, perhaps with a core dump: to be asked in between, and then to
 * end soon. */
bool thread_woke(void);
/* CPU time that run_unstopped() took since the last call. */
uint64_t unstopped_cpu_ns(void);
/* Ends the process: a page of it is nowhere that it could be read. */
void __attribute__((noreturn)) strand(void);
/* Whether one was killed. Somebody kills what he does not know: he is left alone, by whoever runs the thread. */
bool unstopped_killed(void);

/* Whether somebody traces the process, who must not meet a page that is away. */
bool traced(void);

#endif
