/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The agent's thread, as the layers below it know it: whether the caller is that thread, and whether the descriptors in its
 * table are its own.
 *
 * The mark, and what is in the table, are the thread's alone: no lock. Who the thread is, whoever starts one writes before it
 * begins.
 */
#ifndef SAMEPAGE_BASE_DESCRIPTORS_H
#define SAMEPAGE_BASE_DESCRIPTORS_H

#include "base/page.h"

bool on_agent_thread(void);
/* The thread pointer of the agent's thread, which is the same for each that there ever is in a process. */
void agent_thread_is(const void *thread_pointer);

/* On the thread. `lost` is called once, on it, when the descriptors turn out to be the application's: whoever keeps numbers of
 * some forgets them. */
bool descriptors_open(void (*lost)(void));
void descriptors_close(void);
void descriptors_forget(void); /* in a forked child */
/* To be asked before one is used; read(), write() and close() of system.c ask by themselves. False: they are the application's
 * by now; none is left to use, and the thread is to end. */
bool descriptors_are_ours(void);

#endif
