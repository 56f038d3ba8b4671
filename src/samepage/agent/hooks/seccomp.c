/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Seccomp filters that the process was started under. (Before the process installs one itself, the agent ends:
 * wrappers.c.)
 *
 * systemd's SystemCallFilter= kills a process that makes a call that is not on its list; container runtimes return
 * EPERM. No call tells what a filter does. One can only try, and the process that tries may be killed. So `samepage
 * run`, if it is under filters, makes a child that makes every call the agent makes (samepage_trial()). If that child
 * lives, `run` says in the environment how many filters there were. Filters are added and never taken away: a
 * descendant under the same number of filters is under the same filters. A process under more filters is left alone:
 * trying them would take a child, and the call that makes the child may be the one that kills.
 *
 * The check itself makes only calls that the loader has just made to load this library, so they are allowed.
 */
#include "base/real.h"
#include "base/system.h"
#include "hooks/hooks.h"
#include "kernel/kernel.h"

#include <fcntl.h>
#include <limits.h>
#include <linux/close_range.h>
#include <linux/futex.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>

#define UNKNOWN ULONG_MAX
#define TRIAL_MS 2000 /* a filter that asks a supervisor (SECCOMP_RET_USER_NOTIF) may never be answered */

/* How many filters the process is under, or UNKNOWN. */
static unsigned long count_filters(void)
{
	static const char key[] = "\nSeccomp_filters:";
	char text[4096], *found;
	long got = 0, n = 1;
	int fd = (int)raw_syscall(SYS_openat, AT_FDCWD, (long)"/proc/self/status", O_RDONLY | O_CLOEXEC, 0, 0, 0);

	if (fd < 0)
		return UNKNOWN;
	while (n > 0 && got < (long)sizeof(text) - 1) {
		n = raw_syscall(SYS_read, fd, (long)text + got, (long)sizeof(text) - 1 - got, 0, 0, 0);
		got += n > 0 ? n : 0;
	}
	raw_syscall(SYS_close, fd, 0, 0, 0, 0, 0);
	text[got] = '\0';
	found = strstr(text, key);
	/* A kernel without filters has no such line. The line came with Linux 5.9. */
	return found ? strtoul(found + sizeof(key) - 1, NULL, 10) : 0;
}

/* ---- the trial ------------------------------------------------------------------------------------------- */

#define NOTHING (-1)
#define ANON (MAP_PRIVATE | MAP_ANONYMOUS)

struct trial {
	long number, a[6];
};

/* All calls that the agent makes, in such a way that they do nothing. Where a filter may look at arguments (ioctl,
 * prctl, madvise, socket, fcntl), these are the agent's. */
static const struct trial trials[] = {
	{SYS_openat, {NOTHING, (long)"", O_RDONLY}},
	{SYS_read, {NOTHING}},
	{SYS_write, {NOTHING}},
	{SYS_close, {NOTHING}},
	{SYS_pread64, {NOTHING}},
	{SYS_pwrite64, {NOTHING}},
	{SYS_lseek, {NOTHING}},
	{SYS_ftruncate, {NOTHING}},
	{SYS_fstat, {NOTHING}},
	{SYS_fcntl, {NOTHING, F_ADD_SEALS}},
	{SYS_fcntl, {NOTHING, F_GET_SEALS}},
	{SYS_faccessat, {NOTHING, (long)""}},
	{SYS_readlinkat, {NOTHING, (long)""}},
	{SYS_getdents64, {NOTHING}},
	{SYS_chdir, {(long)""}},
	{SYS_socket, {AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK}},
	{SYS_connect, {NOTHING}},
	{SYS_getsockopt, {NOTHING, SOL_SOCKET, SO_PEERCRED}},
	{SYS_setsockopt, {NOTHING, SOL_SOCKET, SO_SNDBUF}},
	{SYS_sendmsg, {NOTHING}},
	{SYS_recvmsg, {NOTHING}},
	{SYS_ppoll, {0, NOTHING}}, /* it does not wait: this many descriptors are refused */
	{SYS_signalfd4, {NOTHING}},
	{SYS_close_range, {INT32_MAX, INT32_MAX, CLOSE_RANGE_UNSHARE}},
	{SYS_pipe2, {0, O_CLOEXEC}},
	{SYS_vmsplice, {NOTHING}},
	{SYS_memfd_create, {0, 1}},
	{SYS_userfaultfd, {O_CLOEXEC | O_NONBLOCK}},
	{SYS_ioctl, {NOTHING, UFFDIO_API}},
	{SYS_ioctl, {NOTHING, UFFDIO_REGISTER}},
	{SYS_ioctl, {NOTHING, UFFDIO_WRITEPROTECT}},
	{SYS_mmap, {0, 0, PROT_READ, ANON, NOTHING}},
	{SYS_mmap, {0, 0, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, NOTHING}},
	{SYS_munmap, {0, 0}},
	{SYS_mprotect, {0, 0, PROT_READ | PROT_WRITE}},
	{SYS_mremap, {0, 0, 0, MREMAP_MAYMOVE | MREMAP_FIXED, 0}},
	{SYS_msync, {0, 0, MS_ASYNC}},
	{SYS_mincore, {0, 0}},
	{SYS_munlock, {0, 0}},
	{SYS_madvise, {0, 0, MADV_DONTNEED}},
	{SYS_madvise, {0, 0, MADV_DONTFORK}},
	{SYS_madvise, {0, 0, MADV_DOFORK}},
	{SYS_madvise, {0, 0, MADV_COLD}},
	{SYS_madvise, {0, 0, MADV_POPULATE_WRITE}},
	{SYS_madvise, {0, 0, MADV_COLLAPSE}},
	{SYS_mbind, {0, 0, 0}},
	{SYS_set_mempolicy, {0, 0, 0}},
	{SYS_get_mempolicy, {0, 0, 0, 0, 0}},
	{SYS_move_pages, {0, 0}},
	{SYS_sched_yield, {0}},
	{SYS_sched_setscheduler, {NOTHING, SCHED_OTHER}},
	{SYS_sched_setaffinity, {NOTHING}},
	{SYS_sched_getaffinity, {NOTHING}},
	{SYS_getpriority, {PRIO_PROCESS, 0}},
	{SYS_setpriority, {NOTHING}},
	{SYS_ioprio_set, {NOTHING}},
	{SYS_prlimit64, {0, RLIMIT_AS, 0, 0}},
	{SYS_timer_create, {NOTHING, 0, 0}},
	{SYS_timer_settime, {NOTHING, 0, 0, 0}},
	{SYS_prctl, {PR_SET_TIMERSLACK, 50000}},
	{SYS_prctl, {PR_SET_NAME, (long)"samepage"}},
	{SYS_prctl, {PR_SET_MEMORY_MERGE, 0}},
	{SYS_prctl, {PR_GET_MEMORY_MERGE}},
	{SYS_prctl, {PR_GET_THP_DISABLE}},
	{SYS_getpid, {0}},
	{SYS_gettid, {0}},
	{SYS_geteuid, {0}},
	{SYS_getrusage, {NOTHING}},
	{SYS_sysinfo, {0}},
	{SYS_get_robust_list, {NOTHING}},
	{SYS_clock_gettime, {NOTHING}},
	{SYS_clock_nanosleep, {NOTHING}},
	{SYS_rt_sigprocmask, {NOTHING}},
	{SYS_rt_sigaction, {NOTHING}},
	{SYS_tgkill, {NOTHING, NOTHING, 0}},
	{SYS_futex, {0, FUTEX_WAKE_OP_PRIVATE}},
	{SYS_wait4, {0, 0, WNOHANG | __WCLONE}},
	/* A thread must share the memory of its process (CLONE_VM), so this makes none. */
	{SYS_clone, {CLONE_THREAD | CLONE_SIGHAND | CLONE_FILES | CLONE_SYSVSEM}},
};

#define NR_TRIALS (sizeof(trials) / sizeof(trials[0]))

/* Runs in the child. *at: the call that is being made. */
static _Noreturn void try_all(_Atomic long *at)
{
	const unsigned long no_core[2] = {0, 0};
	struct {
		void *handler;
		unsigned long flags;
		void *restorer;
		unsigned long mask;
	} usual = {0};

	raw_syscall(SYS_rt_sigaction, SIGSYS, (long)&usual, 0, _NSIG / 8, 0, 0);
	raw_syscall(SYS_prlimit64, 0, RLIMIT_CORE, (long)no_core, 0, 0, 0);
	for (size_t i = 0; i < NR_TRIALS; i++) {
		const long *a = trials[i].a;

		*at = trials[i].number;
		raw_syscall(trials[i].number, a[0], a[1], a[2], a[3], a[4], a[5]);
	}
	*at = SYS_exit;
	raw_syscall(SYS_exit, 0, 0, 0, 0, 0, 0);
	__builtin_trap();
}

/* Waits for the child, but not for ever. Returns whether it came to its end. */
static bool ends_well(long pid)
{
	const struct timespec step = {.tv_nsec = 1000000};
	int status = 1;

	for (int i = 0; i < TRIAL_MS; i++) {
		if (raw_syscall(SYS_wait4, pid, (long)&status, WNOHANG | __WCLONE, 0, 0, 0))
			return !status;
		raw_syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, (long)&step, 0, 0, 0);
	}
	raw_syscall(SYS_kill, pid, SIGKILL, 0, 0, 0, 0);
	raw_syscall(SYS_wait4, pid, (long)&status, __WCLONE, 0, 0, 0);
	return false;
}

/* Returns 0 if none of the agent's calls is fatal under the filters of this process; else the number of one that is, or
 * -errno. */
SP_EXPORT long samepage_trial(void)
{
	_Atomic long *at = real.mmap(NULL, PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	long pid, ret;

	if (at == MAP_FAILED)
		return -errno;
	*at = SYS_rt_sigaction;
	pid = raw_syscall(SYS_clone, 0, 0, 0, 0, 0, 0); /* a child that sends no signal when it ends */
	if (!pid)
		try_all(at);
	ret = pid < 0 ? pid : ends_well(pid) ? 0 : *at;
	real.munmap((void *)at, PAGE_SIZE);
	return ret;
}

/* ---- the verdict ----------------------------------------------------------------------------------------- */

bool seccomp_allows(const char *tried)
{
	unsigned long filters = count_filters();

	if (filters && filters != UNKNOWN && (!tried || strtoul(tried, NULL, 10) != filters)) {
		say_left_alone(" is under a seccomp filter that was not tried when it was started", "");
		return false;
	}
	return filters != UNKNOWN;
}

bool seccomp_allows_asked(void)
{
	static int known = -1;

	if (known < 0)
		known = !count_filters() || !samepage_trial();
	return known;
}
