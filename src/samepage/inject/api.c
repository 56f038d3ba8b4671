/* SPDX-License-Identifier: Apache-2.0 */
/* What Python calls (inject/__init__.py). */
#define _GNU_SOURCE
#include "inject.h"

#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

/* More than a page of the stack and what the kernel takes for the calls: it charges 64 pages ahead on each CPU. */
#define ROOM (512UL << 10)

struct calls {
	pid_t pid;
	int pidfd;
	size_t n;
	struct inject_call call[];
};

static enum inject_error make_calls(void *arg)
{
	static __thread struct tracee t;
	struct calls *c = arg;
	enum inject_error err;

	t = (struct tracee){.pid = c->pid, .pidfd = c->pidfd};
	err = begin(&t);
	for (size_t i = 0; !err && i < c->n; i++) {
		err = make_call(&t, &c->call[i]);
		if (!err && c->call[i].ret < 0)
			break;
	}
	if (!err)
		err = end(&t);
	forget(&t);
	return err;
}

/* Makes calls in the name of a process, in order, until one fails. Returns an enum inject_error. */
EXPORT int samepage_inject_calls(pid_t pid, int pidfd, struct inject_call *call, size_t n)
{
	struct calls *c;
	enum inject_error err;
	bool unseen;

	if (headroom_of(pid, &unseen) < ROOM && !unseen)
		return INJECT_NO_MEMORY;
	c = malloc(sizeof(*c) + n * sizeof(*call));
	if (!c)
		return INJECT_FAILED;
	*c = (struct calls){pid, pidfd, n};
	memcpy(c->call, call, n * sizeof(*call));
	err = on_own_thread(make_calls, c);
	if (err == INJECT_STUCK)
		return err;
	memcpy(call, c->call, n * sizeof(*call));
	free(c);
	return err;
}
