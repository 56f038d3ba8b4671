/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How processes begin and end, as far as it concerns the agent's thread: it does not exist in a child, it must not
 * exist when the kernel demands a process of one thread, and it must not keep a process alive whose own threads have
 * all ended.
 */
#include "base/real.h"
#include "base/system.h"
#include "hooks/hooks.h"

#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* ---- forks --------------------------------------------------------------------------------------------- */

/* The lock is held across a fork, so that no step of the agent's is half done in the child. The child's signals stay
 * blocked until its lock is valid again. */
static sigset_t fork_mask;

/* Takes the lock for a fork, and notes it. */
static void lock_for_fork(sigset_t *saved)
{
	mmap_lock_for_fork(saved);
	note_fork();
}

static void before_fork(void)
{
	sigset_t mask;

	lock_for_fork(&mask);
	fork_mask = mask; /* only now that we have the lock: another thread may have been forking */
}

static void after_fork_parent(void)
{
	sigset_t mask = fork_mask;

	mmap_unlock(&mask);
}

static void after_fork_child(const sigset_t *saved, bool plain)
{
	forked(plain);
	heap_forked();
	pthread_sigmask(SIG_SETMASK, saved, NULL);
}

static void after_fork_child_handler(void)
{
	sigset_t mask = fork_mask;

	after_fork_child(&mask, false);
}

extern void *__dso_handle __attribute__((visibility("hidden")));

/* musl has pthread_atfork() instead. What it has to allocate for dlerror() passes us by. */
static void fork_init_musl(void)
{
	int (*atfork)(void (*)(void), void (*)(void), void (*)(void));

	*(void **)&atfork = dlsym(RTLD_NEXT, "pthread_atfork");
	if (atfork)
		atfork(before_fork, after_fork_parent, after_fork_child_handler);
}

/*
 * Handlers that were registered first run last before a fork and first after it. So ours must be the first of all:
 * others may allocate, or wait for threads that do (OpenBLAS joins its threads), and would do so under our lock.
 * Constructors of other libraries run before ours, hence this wrapper.
 */
void fork_init(void)
{
	if (next.register_atfork)
		next.register_atfork(before_fork, after_fork_parent, after_fork_child_handler, __dso_handle);
	else
		fork_init_musl();
}

/* glibc has had it since 2.34. To look for it earlier than in our constructor would not do (libc.c); until then _Fork()
 * is the system call. */
void fork_look_up(void)
{
	*(void **)&next._Fork = dlsym(RTLD_NEXT, "_Fork");
}

SP_EXPORT int __register_atfork(void (*prepare)(void), void (*parent)(void), void (*child)(void), void *dso)
{
	need_next();
	return next.register_atfork ? next.register_atfork(prepare, parent, child, dso) : ENOSYS;
}

/* A fork that runs no handlers. The child returns from here, too. */
long plain_fork(long number, const long *arg)
{
	sigset_t saved;
	long pid;

	lock_for_fork(&saved);
	if (number < 0)
		pid = next._Fork ? next._Fork() : real.syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
	else
		pid = real.syscall(number, arg[0], arg[1], arg[2], arg[3], arg[4], arg[5]);
	if (pid)
		mmap_unlock(&saved);
	else
		after_fork_child(&saved, true);
	return pid;
}

SP_EXPORT pid_t _Fork(void)
{
	need_next();
	return (pid_t)plain_fork(-1, NULL);
}

struct clone_start {
	int (*fn)(void *);
	void *arg;
	sigset_t saved;
};

/* In the child, on its own stack. `p` is on the parent's stack, of which the child has a copy. */
static int clone_child(void *p)
{
	struct clone_start start = *(struct clone_start *)p;
	int ret;

	after_fork_child(&start.saved, true);
	ret = start.fn(start.arg);
	agent_stop(); /* libc's clone() now ends this thread only, not the process */
	return ret;
}

SP_EXPORT int clone(int (*fn)(void *), void *stack, int flags, void *arg, ...)
{
	struct clone_start start = {fn, arg, {{0}}};
	void *ids[3]; /* parent_tid, tls, child_tid */
	int pid;

	ARGUMENTS(ids, arg);
	need_next();
	if (flags & CLONE_VM && flags & CLONE_CHILD_CLEARTID)
		left_in_place(ids[2], sizeof(pid_t));
	if (flags & CLONE_VM || !fn || !stack) /* shares our memory, or will be refused */
		return next.clone(fn, stack, flags, arg, ids[0], ids[1], ids[2]);
	lock_for_fork(&start.saved);
	pid = next.clone(clone_child, stack, flags, &start, ids[0], ids[1], ids[2]);
	mmap_unlock(&start.saved);
	return pid;
}

/* The start of struct clone_args (Linux 5.3). */
struct clone3_args {
	uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack;
};

/* Whether the call makes a child that has its own memory and returns here. With a stack of its own, the child goes on
 * there instead. */
bool is_plain_fork(long number, const long *arg)
{
	const struct clone3_args *a = (const struct clone3_args *)arg[0];

#ifdef SYS_fork
	if (number == SYS_fork)
		return true;
#endif
	if (number == SYS_clone)
		return !(arg[0] & CLONE_VM) && !arg[1];
	return number == SYS_clone3 && arg[1] >= (long)sizeof(*a) && is_readable(a, sizeof(*a)) &&
	       !(a->flags & CLONE_VM) && !a->stack;
}

/* ---- calls that demand a process of one thread ----------------------------------------------------------- */

/*
 * Makes a call that the kernel refuses with EINVAL in a process of several threads, with the agent's thread ended
 * meanwhile. A thread that has ended is still counted for a moment, until the kernel has released its task (Linux 6.18:
 * 9 of 20 calls came too early); hence the tries, for at most 20 ms.
 */
static int call_alone(long number, long a, long b)
{
	const struct timespec nap = {.tv_nsec = 200000};
	bool left = agent_leave();
	int ret, err;

	for (int tries = 0;; tries++) {
		ret = number == SYS_setns ? next.setns((int)a, (int)b) : next.unshare((int)a);
		err = errno;
		if (!ret || err != EINVAL || !agent_configured() || tries == 100)
			break;
		real.syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &nap, NULL);
	}
	agent_return(left);
	errno = err;
	return ret;
}

int sp_unshare(int flags)
{
	need_next();
	if (flags & (CLONE_NEWUSER | CLONE_THREAD | CLONE_SIGHAND | CLONE_VM))
		return call_alone(SYS_unshare, flags, 0);
	return next.unshare(flags);
}

int sp_setns(int fd, int type)
{
	need_next();
	return call_alone(SYS_setns, fd, type);
}

SP_EXPORT int unshare(int flags)
{
	return sp_unshare(flags);
}

SP_EXPORT int setns(int fd, int type)
{
	return sp_setns(fd, type);
}

/* ---- the last thread ------------------------------------------------------------------------------------- */

/*
 * A process ends when its last thread does. libc counts the threads that it made and ends the process with the last of
 * them. But if the main thread ends by the bare system call, and the others do too, the agent's thread would be left
 * over. So it ends before that, for good. (If the system call is inline, the thread notices by itself: wait_for().)
 */
void leader_exits(void)
{
	if (agent_may_run() && real.syscall(SYS_gettid) == getpid())
		agent_retire();
}
