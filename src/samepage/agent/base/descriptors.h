/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The agent's thread, as the layers below it know it: whether the caller is that thread, and whether the descriptors in
 * its table are its own.
 *
 * Only the thread uses its descriptors and the mark (descriptors.c), so they need no lock. agent_thread_is() is called
 * before the thread begins.
 */
#ifndef SAMEPAGE_BASE_DESCRIPTORS_H
#define SAMEPAGE_BASE_DESCRIPTORS_H

#include "base/page.h"

bool on_agent_thread(void);
/* Says which thread is the agent's, by its thread pointer. That is the same for every agent thread that a process ever
 * has. */
void agent_thread_is(const void *thread_pointer);

/* Both are for the agent's thread. If the descriptors turn out to be the application's, `lost` is called once, on that
 * thread, so that the upper layers forget the numbers they keep. */
bool descriptors_open(void (*lost)(void));
void descriptors_close(void);
void descriptors_forget(void); /* in a forked child */
/* Ask this before using a descriptor; read(), write() and close() of system.c ask it themselves. False: the descriptors
 * are the application's by now, none may be used, and the thread has to end. */
bool descriptors_are_ours(void);

#endif
