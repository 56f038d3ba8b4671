/* SPDX-License-Identifier: Apache-2.0 */
/*
 * When to stop a thread. A thread may wait, for a limited time, in a call that returns EINTR for every stop. After a
 * stop it makes that call again and waits for the whole time again (inject.h). If it has only just begun the wait,
 * nobody notices. So settle() waits until the thread has run; a thread that waits in a loop has then just begun its
 * next wait.
 */
#define _GNU_SOURCE
#include "inject.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

#define WAIT_MS 1000 /* the thread is stopped after that all the same: its wait is longer */

static bool waits_for_a_time(pid_t pid)
{
	struct waits waits = call_of(pid);

	return waits.nr >= 0 && timeout_of(waits.nr, waits.arg) >= 0;
}

/* How often the thread has gone to sleep. */
static unsigned long sleeps(pid_t pid)
{
	unsigned long n = 0;
	char text[4096];
	const char *p;

	if (!read_proc(pid, "status", text, sizeof(text)))
		return 0;
	p = strstr(text, "\nvoluntary_ctxt_switches:");
	if (p)
		sscanf(p, "\nvoluntary_ctxt_switches: %lu", &n);
	return n;
}

void settle(pid_t pid)
{
	unsigned long before = sleeps(pid);

	for (int ms = 0; ms < 2 * WAIT_MS && waits_for_a_time(pid) && sleeps(pid) == before; ms++)
		nanosleep(&(struct timespec){0, 500000}, NULL);
}
