/* SPDX-License-Identifier: Apache-2.0 */
/* Steps that nobody can stop half-way. For the agent thread, or the child that makes a step for it. */
#ifndef SAMEPAGE_PAGES_UNSTOPPED_H
#define SAMEPAGE_PAGES_UNSTOPPED_H

#include "base/page.h"

/* Runs fn(arg) in a child that cannot be stopped, on behalf of the agent thread. False: the child was killed in the
 * middle. */
bool run_unstopped(void (*fn)(void *), void *arg);
/* Whether the agent thread woke meanwhile: then the process is ending, perhaps with a core dump. Ask now and then, and
 * if so, finish soon. */
bool thread_woke(void);
/* Whether a step that began when the child had used so much CPU time (thread_cpu_ns()) goes on: for `least` ns of it, or
 * for longer if ending a child is dear. */
bool step_goes_on(uint64_t began, uint64_t least);
/* The CPU time that run_unstopped() took since the last call of this. */
uint64_t unstopped_cpu_ns(void);
/* Ends the process: one of its pages is where the process can never read it. */
void __attribute__((noreturn)) strand(void);
/* Whether a child was killed. Somebody kills processes that he does not know; whoever runs the thread then leaves this
 * process alone. */
bool unstopped_killed(void);

/* Whether somebody traces the process. A tracer must not meet a page that is away. */
bool traced(void);

#endif
