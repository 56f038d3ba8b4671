/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Whether the thread's descriptors are its own.
 *
 * A process that is restored from a checkpoint (CRIU) has one table of them for all its threads, the first one's. What the
 * agent's thread takes for its socket is then a descriptor of the application's, and what it reads there the application
 * never gets. So it has a *mark* in its table, a socket that is like no other, and looks whether that is still there
 * before it reads or writes; this costs a tenth of a microsecond. When it is not, the thread ends, for good, and closes nothing.
 */
#include "base/descriptors.h"
#include "base/system.h"

#include <sys/socket.h>
#include <unistd.h>

static struct {
	int fd;
	int value; /* what its SO_RCVLOWAT is, which is 1 unless somebody sets it; 0: there is no mark */
	bool lost;
	void (*when_lost)(void);
} mark = {.fd = -1};

static const void *agent_thread;

void agent_thread_is(const void *thread_pointer)
{
	agent_thread = thread_pointer;
}

bool on_agent_thread(void)
{
	return agent_thread && arch_thread_pointer() == agent_thread;
}

bool descriptors_open(void (*lost)(void))
{
	struct timespec now;

	mark.fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	clock_gettime(CLOCK_MONOTONIC, &now);
	mark.value = (int)((1U << 30) | (((uint32_t)now.tv_nsec ^ (uint32_t)getpid() << 8) & ((1U << 30) - 1)));
	mark.lost = false;
	mark.when_lost = lost;
	return mark.fd >= 0 && !setsockopt(mark.fd, SOL_SOCKET, SO_RCVLOWAT, &mark.value, sizeof(mark.value));
}

void descriptors_close(void)
{
	if (mark.fd >= 0)
		close(mark.fd);
	descriptors_forget();
}

void descriptors_forget(void)
{
	mark.fd = -1;
	mark.value = 0;
}

bool descriptors_are_ours(void)
{
	int value = 0;
	socklen_t len = sizeof(value);

	if (!on_agent_thread()) /* which never uses the thread's */
		return true;
	if (mark.lost)
		return false;
	/* Not by getsockopt() of system.c: callers may have an errno to tell. */
	if (!mark.value ||
	    (!raw_syscall(SYS_getsockopt, mark.fd, SOL_SOCKET, SO_RCVLOWAT, (long)&value, (long)&len, 0) &&
	     value == mark.value))
		return true;
	mark.lost = true;
	descriptors_forget();
	mark.when_lost();
	return false;
}
