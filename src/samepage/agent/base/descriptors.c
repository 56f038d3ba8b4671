/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Whether the thread's descriptors are its own.
 *
 * CRIU restores a process with one table of descriptors for all its threads, the first thread's. The number of the
 * agent's socket then is a descriptor of the application's, and the application would never get what the agent reads
 * there. So the thread keeps a *mark* in its table, a socket with an unlikely option value, and looks whether that is
 * still there before it reads or writes; this costs a tenth of a microsecond. When the mark is gone, the thread ends
 * for good and closes nothing.
 */
#include "base/descriptors.h"
#include "base/system.h"

#include <sys/socket.h>
#include <unistd.h>

static struct {
	int fd;
	int value; /* its SO_RCVLOWAT, which is 1 on sockets on which nobody set it; 0: there is no mark */
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

	if (!on_agent_thread()) /* other threads never use its descriptors */
		return true;
	if (mark.lost)
		return false;
	/* The caller may still need errno, so don't use system.c's getsockopt(), which sets it. */
	if (!mark.value ||
	    (!raw_syscall(SYS_getsockopt, mark.fd, SOL_SOCKET, SO_RCVLOWAT, (long)&value, (long)&len, 0) &&
	     value == mark.value))
		return true;
	mark.lost = true;
	descriptors_forget();
	mark.when_lost();
	return false;
}
