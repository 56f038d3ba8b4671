/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Work that an application's thread hands to the agent's thread, which alone has the descriptors.
 *
 * The caller must be able to wake the thread without any of the thread's descriptors, without a descriptor to spare,
 * and without permission for /proc, which a process that changed its user has lost. So it sends a signal, which every
 * thread may send to any other thread of its process. The agent's thread has all signals blocked, and reads it from a
 * signalfd that it polls beside its socket.
 */
#include "base/real.h"
#include "kernel/kernel.h"
#include "kernel/window.h"
#include "pages/pages.h"
#include "pages/unstopped.h"
#include "thread/peer.h"

#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <unistd.h>

/* SIGSETXID, which is libc's own: no program can wait for it. Any other signal would be unsafe: a signalfd also reads
 * signals sent to the whole process, so it would take away those that a program has blocked everywhere and waits
 * for. */
#define WAKE_SIGNAL 33
#define LEADER_CHECK_MS 1000

enum { FREE, POSTED, TAKEN, DONE_CALL };

static struct mutex call_lock; /* held by the one caller */
static struct {
	void (*fn)(void *arg);
	void *arg;
	_Atomic uint32_t state; /* the caller sleeps on it */
} call;

static int wake_fd = -1;	    /* the thread's signalfd */
static _Atomic uint32_t taking_tid; /* 0 unless the thread takes calls */

void thread_wake(void)
{
	raw_syscall(SYS_tgkill, thread.owner, atomic_load(&thread.tid), WAKE_SIGNAL, 0, 0, 0);
}

/* Takes back a call that the thread has not begun. False: the thread has begun it, and will finish it. */
static bool withdraw(void)
{
	uint32_t posted = POSTED;

	return atomic_compare_exchange_strong(&call.state, &posted, FREE);
}

int agent_call(void (*fn)(void *arg), void *arg)
{
	const struct timespec second = {.tv_sec = 1};
	sigset_t saved;
	uint32_t state, tid;
	int err = 0;

	if (on_agent_thread()) {
		fn(arg);
		return 0;
	}
	if (!thread_is_here())
		return -ENOTCONN;
	/* Block signals: a handler that made a call would wait for itself, and a cancelled thread would keep the
	 * lock. */
	block_signals(&saved);
	mutex_lock(&call_lock);
	tid = atomic_load(&taking_tid);
	if (tid) {
		call.fn = fn;
		call.arg = arg;
		atomic_store(&call.state, POSTED);
		thread_wake();
		while ((state = atomic_load(&call.state)) != DONE_CALL) {
			/* The thread may have ended before it came to this call; the next thread must not find it. */
			if (state == POSTED && atomic_load(&taking_tid) != tid && withdraw()) {
				err = -ENOTCONN;
				break;
			}
			futex_wait(&call.state, state, &second);
		}
		atomic_store(&call.state, FREE);
	} else {
		err = -ENOTCONN;
	}
	mutex_unlock(&call_lock);
	pthread_sigmask(SIG_SETMASK, &saved, NULL);
	return err;
}

static void take_call(void)
{
	uint32_t posted = POSTED;

	if (!atomic_compare_exchange_strong(&call.state, &posted, TAKEN))
		return;
	call.fn(call.arg);
	atomic_store(&call.state, DONE_CALL);
	futex_wake(&call.state);
}

static void calls_abandon(void)
{
	wake_fd = -1;
	atomic_store(&taking_tid, 0);
	futex_wake(&call.state);
}

/* The descriptors in the thread's table are the application's by now, so the thread ends. What is in the windows stays
 * there. */
static void descriptors_lost(void)
{
	thread_retires();
	calls_abandon();
	peer_forget();
	window_lost();
	kernel = KERNEL_CLOSED;
}

bool calls_open(void)
{
	const uint64_t mask = 1ULL << (WAKE_SIGNAL - 1);

	wake_fd = (int)real.syscall(SYS_signalfd4, -1, &mask, sizeof(mask), O_CLOEXEC | O_NONBLOCK);
	if (wake_fd < 0 || !descriptors_open(descriptors_lost))
		return false;
	atomic_store(&taking_tid, atomic_load(&thread.tid));
	return true;
}

void calls_close(void)
{
	if (wake_fd >= 0)
		close(wake_fd);
	descriptors_close();
	calls_abandon();
}

bool calls_taken(void)
{
	return atomic_load(&taking_tid);
}

void calls_forget(void)
{
	call_lock = (struct mutex){0};
	atomic_store(&call.state, FREE);
	atomic_store(&taking_tid, 0);
	wake_fd = -1;
	descriptors_forget();
}

/* If the main thread ends by the bare system call, the process lives until its other threads have ended, and must not
 * wait for this one. (libc counts its own threads and ends the process without counting this one.) */
static void end_if_alone(void)
{
	char buf[2048];
	const char *state, *threads;
	void *robust = NULL;
	size_t len;
	ssize_t got;

	/* glibc gives every thread a robust list, and the kernel forgets it when the thread ends. Asking takes a tenth
	 * of the time that reading the file takes, and is mostly enough. */
	if (!real.syscall(SYS_get_robust_list, thread.owner, &robust, &len) && robust)
		return;
	got = read_file("/proc/self/status", buf, sizeof(buf) - 1);
	if (got <= 0)
		return;
	buf[got] = 0;
	state = strstr(buf, "\nState:\tZ");
	threads = strstr(buf, "\nThreads:\t");
	if (state && threads && strtoul(threads + 10, NULL, 10) == 2)
		atomic_store(&thread.stop, true);
}

short wait_for(int fd, short events, int timeout_ms)
{
	const struct timespec nap = {.tv_nsec = 50000000};
	struct pollfd p[2] = {{.fd = wake_fd, .events = POLLIN}, {.fd = fd, .events = events}};
	struct signalfd_siginfo drain;
	static time_t looked;
	struct timespec now;

	if (poll(p, 2, timeout_ms < LEADER_CHECK_MS ? timeout_ms : LEADER_CHECK_MS) < 0) {
		/* RLIMIT_NOFILE may have become less than two, say: look now and then. */
		real.syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &nap, NULL);
		p[0].revents = p[1].revents = 0;
	}
	if (!descriptors_are_ours())
		return 0;
	while (p[0].revents && read(wake_fd, &drain, sizeof(drain)) > 0)
		;
	/* Do this even if nobody woke us: if the kernel dropped a signal, the call is only late, not lost. */
	take_call();
	if (unstopped_killed())
		thread_retires();
	/* Go by the clock: a service in a hurry leaves no pauses. */
	clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
	if (now.tv_sec != looked) {
		looked = now.tv_sec;
		end_if_alone();
	}
	return p[1].revents;
}

struct unmerge_call {
	uintptr_t start, end;
	uint64_t max_pages;
	struct sp_broken *out;
};

static void unmerge_on_agent(void *arg)
{
	struct unmerge_call *c = arg;

	break_ksm(c->start, c->end, c->max_pages, c->out);
}

void unmerge_range(uintptr_t start, uintptr_t end, uint64_t max_pages, struct sp_broken *out)
{
	struct unmerge_call c = {start, end, max_pages, out};

	if (!agent_call(unmerge_on_agent, &c))
		return;
	break_ksm(start, end, max_pages, out);
}
