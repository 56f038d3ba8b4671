/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Running a step so that nobody can stop it half-way.
 *
 * While pages are swapped, some are out of their place. A thread that touches one waits. A reader from outside
 * (/proc/PID/mem, a core dump) cannot wait, or waits for this thread; and if it is a debugger that has stopped this
 * thread, it waits for ever. A stop (SIGSTOP, ptrace(2)) takes effect whenever a thread is about to return from a
 * system call, so a thread cannot keep itself from being stopped between two calls. But it can let another process make
 * them, and wait for that process inside the kernel, where no stop takes effect: as vfork(2) does.
 *
 * So this thread sleeps in clone(2) until the step is over, and stops only then, with all pages in their places. The
 * child shares our memory and our descriptors. Our tracer does not get it (CLONE_UNTRACED), it is not in the list of
 * our threads, the application's wait(2) does not see it (no exit signal), and it lives for a few milliseconds.
 *
 * A process that dumps core kills its threads first. That wakes this thread, but does not reach the child; the child
 * looks now and then whether this thread woke, and then hurries.
 *
 * Two things do reach the child: the freezer of its cgroup, and a signal sent to its own pid. The latter may kill it in
 * the middle; then the caller finishes what it began (swap_recover(), restore_recover()). A timer of the child's own
 * kills it, too, if the kernel does not return from a call: with a pinned part of a huge page, say (splits() in
 * move.c).
 */
#include "pages/unstopped.h"
#include "base/real.h"
#include "base/system.h"
#include "kernel/kernel.h"

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SHARE 16	       /* a step takes so many times as long as ending its child, */
#define LONGEST_NS 500000000UL /* but no longer than this: meanwhile nobody can stop the process */

#define CHILD_FLAGS (CLONE_VM | CLONE_VFORK | CLONE_FILES | CLONE_FS | CLONE_UNTRACED)

static struct {
	void (*fn)(void *arg);
	bool inside;   /* this is the child */
	bool ended;    /* the child came to its end */
	bool stranded; /* see strand() */
	bool killed;   /* a child was killed */
	unsigned looks;
	char stat[64]; /* schedstat of the sleeping agent thread */
	uint64_t cpu_ns;
	uint64_t began;	 /* now_ns() */
	uint64_t at_end; /* now_ns(), when the child had done its work */
	uint64_t ending; /* ns from then until it was gone, of late */
} step;

/* Kills this process if it is still there after so many seconds. A timer of CPU time, or RLIMIT_CPU, would take effect
 * only when the kernel returns from the call (CONFIG_POSIX_CPU_TIMERS_TASK_WORK, 5.9). */
static void die_in(long seconds)
{
	struct sigevent kill = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGKILL};
	const struct itimerspec then = {.it_value.tv_sec = seconds};
	int timer;

	if (!raw_syscall(SYS_timer_create, CLOCK_MONOTONIC, (long)&kill, (long)&timer, 0, 0, 0))
		raw_syscall(SYS_timer_settime, timer, 0, (long)&then, 0, 0, 0);
}

static void child(void *arg)
{
	die_in(10);
	step.inside = true;
	step.looks = 0;
	step.fn(arg);
	step.inside = false;
	step.cpu_ns += thread_cpu_ns();
	step.at_end = now_ns();
	step.ended = true;
}

/* The kernel counts the mappings of a process that ends (acct_collect()), though these are ours, so it takes the longer the more
 * there are. On a busy machine it may also take long for no such reason. */
static void note_ending(void)
{
	uint64_t took = now_ns() - step.at_end;

	step.ending = took < step.ending ? took : step.ending + (took - step.ending) / 8;
}

bool step_goes_on(uint64_t began, uint64_t least)
{
	uint64_t most = SHARE * step.ending;

	return now_ns() - step.began < LONGEST_NS && thread_cpu_ns() - began < (most > least ? most : least);
}

bool run_unstopped(void (*fn)(void *), void *arg)
{
	long pid;

	step.ended = step.stranded = false;
	step.began = now_ns();
	step.fn = fn;
	pid = arch_clone(CHILD_FLAGS, NULL, NULL, NULL, child, arg);
	if (pid < 0) { /* no more processes for this user, or seccomp: better to be stopped now and then than never to
		        * merge */
		fn(arg);
		return true;
	}
	raw_syscall(SYS_wait4, pid, 0, __WCLONE, 0, 0, 0);
	step.inside = false;
	if (step.ended)
		note_ending();
	if (step.stranded)
		strand();
	step.killed |= !step.ended;
	return step.ended;
}

bool unstopped_killed(void)
{
	return step.killed;
}

/* While the thread sleeps it uses no CPU time, and only being killed wakes it. At the first look it may still be going
 * to sleep. */
bool thread_woke(void)
{
	char now[sizeof(step.stat)] = "";

	if (!step.inside || !step.looks++ || pread(kernel.schedstat, now, sizeof(now) - 1, 0) <= 0)
		return false;
	if (step.looks == 2)
		memcpy(step.stat, now, sizeof(now));
	return memcmp(step.stat, now, sizeof(now));
}

uint64_t unstopped_cpu_ns(void)
{
	uint64_t spent = step.cpu_ns;

	step.cpu_ns = 0;
	return spent;
}

void strand(void)
{
	static const char why[] =
		"samepage: the kernel keeps pages of this process from it; ended, for they would read as zeros\n";

	int fd;

	if (step.inside) { /* a trap would end only the child */
		step.stranded = true;
		raw_syscall(SYS_exit, 0, 0, 0, 0, 0, 0);
	}
	/* The application's descriptor 2; this thread has a file table of its own. */
	fd = open("/proc/self/fd/2", O_WRONLY | O_APPEND | O_CLOEXEC | O_NOCTTY);

	if (fd >= 0)
		real.syscall(SYS_write, fd, why, sizeof(why) - 1);
	__builtin_trap(); /* no handler of the application's runs: all signals are blocked */
}

/*
 * Others that read or write the process (ptrace(2), /proc/PID/mem) get EIO at a page that is away, for the kernel
 * cannot let them wait there (get_user_pages_remote() without FOLL_UNLOCKABLE). So a process is left alone while it is
 * traced. A look takes 20 us, so there are at most a hundred a second.
 */
bool traced(void)
{
	static int64_t looked;
	static bool was;
	struct timespec now;
	const char *tracer;
	char buf[1024];
	ssize_t got;
	int file;

	clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
	if (now.tv_sec * 100 + now.tv_nsec / 10000000 == looked)
		return was;
	looked = now.tv_sec * 100 + now.tv_nsec / 10000000;
	file = open("/proc/self/status", O_RDONLY | O_CLOEXEC);
	got = file < 0 ? -1 : read(file, buf, sizeof(buf) - 1);
	if (file >= 0)
		close(file);
	buf[got > 0 ? got : 0] = 0;
	tracer = strstr(buf, "\nTracerPid:\t");
	return was = tracer && tracer[12] != '0';
}
