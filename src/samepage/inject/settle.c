/* SPDX-License-Identifier: Apache-2.0 */
/*
 * When to stop a thread. One that waits in a call which says EINTR for every stop, and for a limited time, makes that call
 * again afterwards and waits for all of the time again (inject.h). If it has only just begun, nobody notices: so it is
 * waited until the thread has run, which for one that waits in a loop comes to the same.
 */
#define _GNU_SOURCE
#include "inject.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define WAIT_MS 1000 /* after which it is stopped all the same: it waits for longer than that */

static bool read_file(pid_t pid, const char *name, char *text, size_t size)
{
	char path[64];
	ssize_t n = -1;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/%s", pid, name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd >= 0) {
		n = read(fd, text, size - 1);
		close(fd);
	}
	text[n > 0 ? n : 0] = '\0';
	return n > 0;
}

static bool waits_for_a_time(pid_t pid)
{
	uint64_t arg[6];
	char text[256];
	long nr;

	return read_file(pid, "syscall", text, sizeof(text)) &&
	       sscanf(text, "%ld %lx %lx %lx %lx %lx %lx", &nr, &arg[0], &arg[1], &arg[2], &arg[3], &arg[4], &arg[5]) ==
		       7 &&
	       arch_timeout(nr, arg) >= 0;
}

/* How often it has gone to sleep. */
static unsigned long sleeps(pid_t pid)
{
	unsigned long n = 0;
	char text[4096];
	const char *p;

	if (!read_file(pid, "status", text, sizeof(text)))
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
