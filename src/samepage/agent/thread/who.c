/* SPDX-License-Identifier: Apache-2.0 */
/* Who the process is: checked on the agent thread before pages are given away or taken (hooks/identity.c). */
#include "thread/peer.h"

#include <string.h>

#define WHO_MAX 256

/* Copies the users and groups of a task from its status file to `who`; "" if it cannot be read. */
static void read_who(const char *status, char *who)
{
	char buf[2048];
	ssize_t got = read_file(status, buf, sizeof(buf) - 1);
	char *start, *end;

	*who = '\0';
	buf[got > 0 ? got : 0] = '\0';
	start = strstr(buf, "\nUid:");
	end = start ? strstr(start, "\nFDSize:") : NULL;
	if (!end || end - start >= WHO_MAX)
		return;
	*end = '\0';
	strcpy(who, start);
}

bool is_same(void)
{
	static char ours[WHO_MAX]; /* only this thread could change its users and groups, and it does not */
	static uint32_t of;
	char theirs[WHO_MAX];

	if (of != atomic_load(&thread.tid))
		read_who("/proc/thread-self/status", ours);
	of = atomic_load(&thread.tid);
	read_who("/proc/self/status", theirs);
	return *ours && !strcmp(ours, theirs);
}
