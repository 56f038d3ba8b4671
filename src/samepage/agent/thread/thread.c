/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How the agent's thread starts and ends.
 *
 * It starts wherever the application first has something to merge: inside malloc and its locks, inside dlopen, in a
 * signal handler, before main. libc's pthread_create allocates and takes locks, so it cannot be used there. The thread
 * is made by clone(2) itself, on a stack of its own, and libc does not know of it. libc goes on treating the process as
 * single-threaded if it was, and what libc does to all threads (setuid(2) and its relatives) does not reach this one
 * (identity.c). In return the thread may use nothing of libc (system.c) except errno, for which it has a place.
 */
#include "base/area.h"
#include "base/lock.h"
#include "base/real.h"
#include "kernel/window.h"
#include "thread/peer.h"

#include <errno.h>
#include <linux/ioprio.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>

#define STACK_SIZE (256UL << 10)
#define TLS_MAX (64UL << 10)
#define WORTH_A_THREAD (16UL << 20) /* bytes mapped or made writable so far that the program did not name */
#define END_TRIES 100		    /* of 100 ms each: how long to wait for the thread's end */
#define MASK_WORDS (8192 / 64)
#define NODES_MAX 1024
#define TIMER_SLACK_NS 50000L
#define NICE_MORE 5 /* as ksmd: set_user_nice() in ksm_scan_thread() of mm/ksm.c */

struct thread thread;
struct mutex life;

/* ---- stack and thread-local storage --------------------------------------------------------------------- */

/* Compiled code finds errno, and some words of libc's, at fixed distances from the thread pointer. Of all the
 * thread-local variables of the libraries that were loaded at the start, the agent uses only errno. */
static struct {
	char *map; /* kept when the thread ends */
	char *stack_top, *end;
	void *thread_pointer;
} room;

/* Maps [guard page | stack | errno, if it is below | libc's words, and errno, if it is above]. False: there is no
 * memory. */
static bool make_room(void)
{
	uintptr_t self = (uintptr_t)arch_thread_pointer(), place = (uintptr_t)&errno;
	uintptr_t below = place < self ? self - place : 0, above = place < self ? 0 : place - self + sizeof(errno);
	size_t size;

	if (room.map)
		return true;
	if (below > TLS_MAX || above > TLS_MAX)
		return false; /* not a libc that we know */
	below = PAGE_ALIGN_UP((below + 64) & ~63UL);
	size = PAGE_SIZE + STACK_SIZE + below + PAGE_ALIGN_UP(above > arch_tcb_size ? above : arch_tcb_size);
	room.map = real.mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (room.map == MAP_FAILED) {
		room.map = NULL;
		return false;
	}
	real.mprotect(room.map, PAGE_SIZE, PROT_NONE);
	room.stack_top = room.map + PAGE_SIZE + STACK_SIZE;
	room.thread_pointer = room.stack_top + below;
	room.end = room.map + size;
	agent_thread_is(room.thread_pointer);
	return true;
}

/* ---- as the process was started ------------------------------------------------------------------------- */

static struct {
	bool noted;
	long affinity_bytes;
	unsigned long affinity[MASK_WORDS];
	int policy; /* memory policy; -1: the kernel has none */
	unsigned long nodes[NODES_MAX / 64];
} defaults;

void thread_note_defaults(void)
{
	if (defaults.noted)
		return;
	defaults.noted = true;
	thread.owner = getpid();
	defaults.affinity_bytes = raw_syscall(SYS_sched_getaffinity, getpid(), sizeof(defaults.affinity),
					      (long)defaults.affinity, 0, 0, 0);
	if (raw_syscall(SYS_get_mempolicy, (long)&defaults.policy, (long)defaults.nodes, NODES_MAX, 0, 0, 0))
		defaults.policy = -1;
}

/*
 * The thread inherits the scheduling and memory policy of the thread that happened to allocate first. That one may have
 * real-time priority, whose share of a CPU this thread must not take; or it may be pinned to a CPU on which something
 * spins, where this thread would sleep with the lock held; or it may take memory from a far node. The program's own
 * threads come first: this one is as nice as the process was started, and NICE_MORE.
 */
void thread_settle(void)
{
	static const int no_priority;
	long nice = raw_syscall(SYS_getpriority, PRIO_PROCESS, getpid(), 0, 0, 0, 0);

	raw_syscall(SYS_sched_setscheduler, 0, SCHED_OTHER, (long)&no_priority, 0, 0, 0);
	if (nice > 0) /* the system call returns 20 - nice; setpriority(2) takes more than 19 for 19 */
		raw_syscall(SYS_setpriority, PRIO_PROCESS, 0, 20 - nice + NICE_MORE, 0, 0, 0);
	if (defaults.affinity_bytes > 0)
		raw_syscall(SYS_sched_setaffinity, 0, defaults.affinity_bytes, (long)defaults.affinity, 0, 0, 0);
	if (defaults.policy >= 0)
		raw_syscall(SYS_set_mempolicy, defaults.policy, (long)defaults.nodes, NODES_MAX, 0, 0, 0);
	raw_syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, 0, 0, 0, 0);
	real.prctl(PR_SET_TIMERSLACK, TIMER_SLACK_NS, 0, 0, 0);
	real.prctl(PR_SET_NAME, "samepage", 0, 0, 0);
}

/* ---- begin ---------------------------------------------------------------------------------------------- */

/* Not CLONE_FS: with a shared fs_struct the application could not call setns(2), and the thread would hold its working
 * directory. */
#define THREAD_FLAGS                                                                                                   \
	(CLONE_VM | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM | CLONE_SETTLS | CLONE_PARENT_SETTID |  \
	 CLONE_CHILD_CLEARTID)

static void thread_main(void *nothing)
{
	(void)nothing;
	peer_main();
}

bool thread_is_here(void)
{
	return atomic_load(&thread.state) == RUNNING && thread.owner == getpid();
}

/* The caller has blocked all signals, and the thread inherits that: no handler of the application's ever runs on it. */
int thread_start(void)
{
	int state = atomic_load(&thread.state);
	long tid;

	if (state != IDLE)
		return state == RETIRED ? -EPERM : 0;
	if (atomic_load(&thread.away))
		return -EAGAIN;
	/* A process that shares our memory (vfork) cannot have a thread in it that outlives it. */
	if (thread.owner != getpid())
		return -EPERM;
	if (!make_room())
		return -ENOMEM;
	memset(room.stack_top, 0, (size_t)(room.end - room.stack_top));
	arch_tcb_init(room.thread_pointer);
	atomic_store(&thread.stop, false);
	atomic_store(&thread.state, RUNNING);
	mmap_lock_watch(forked_unseen);
	windows_reserve();
	tid = arch_clone(THREAD_FLAGS, room.stack_top, &thread.tid, room.thread_pointer, thread_main, NULL);
	if (tid > 0)
		return 0;
	atomic_store(&thread.state, IDLE);
	return (int)tid;
}

void agent_start(void)
{
	int saved_errno = errno;
	sigset_t saved;

	thread.wanted = true;
	if (atomic_load(&thread.state) != IDLE || !nr_areas || !peer.path[0])
		return;
	block_signals(&saved);
	if (mutex_trylock(&life)) {
		thread_start();
		mutex_unlock(&life);
	}
	pthread_sigmask(SIG_SETMASK, &saved, NULL);
	errno = saved_errno;
}

void agent_start_unnamed(size_t bytes)
{
	static _Atomic size_t sum;

	if (thread.wanted || atomic_fetch_add(&sum, bytes) + bytes >= WORTH_A_THREAD)
		agent_start();
}

/* ---- end ------------------------------------------------------------------------------------------------ */

/* Tells the thread to end, and waits. While the thread waits itself, it notices; a step takes milliseconds. Something
 * else may hold it up (a page of the application's that does not come), but that must not hold up the caller for
 * ever. */
static void end_thread(void)
{
	const struct timespec step = {.tv_nsec = 100000000};
	uint32_t tid;

	atomic_store(&thread.stop, true);
	for (int i = 0; (tid = atomic_load(&thread.tid)) && i < END_TRIES; i++) {
		thread_wake();
		/* When the thread ends the kernel wakes `tid` as a shared futex, and futex_wait() waits for one. */
		futex_wait(&thread.tid, tid, &step);
	}
}

static void stop_thread(int state)
{
	int saved_errno = errno;
	sigset_t saved;

	block_signals(&saved);
	mutex_lock(&life);
	if (thread_is_here()) {
		end_thread();
		/* A thread that did not end in time will do so later; no other one is started beside it. */
		atomic_store(&thread.state, atomic_load(&thread.tid) ? RETIRED : state);
	} else if (state == RETIRED && (!thread.owner || thread.owner == getpid())) {
		atomic_store(&thread.state, RETIRED);
	}
	mutex_unlock(&life);
	pthread_sigmask(SIG_SETMASK, &saved, NULL);
	errno = saved_errno;
}

void agent_stop(void)
{
	if (thread_is_here())
		stop_thread(IDLE);
}

void agent_retire(void)
{
	stop_thread(RETIRED);
}

void thread_retires(void)
{
	atomic_store(&thread.stop, true);
	atomic_store(&thread.state, RETIRED);
}

bool agent_leave(void)
{
	if (!agent_may_run() || thread.owner != getpid())
		return false;
	/* Don't hold `life` meanwhile: a thread that waits for it has all signals blocked, and when the process changes
	 * its user, libc waits until every thread has taken a signal. */
	atomic_fetch_add(&thread.away, 1);
	stop_thread(IDLE); /* also waits for a thread that is just being started */
	return true;
}

void agent_return(bool left)
{
	int saved_errno = errno;
	sigset_t saved;
	bool any;

	if (!left)
		return;
	atomic_fetch_sub(&thread.away, 1);
	mmap_lock(&saved);
	any = any_mergeable();
	mmap_unlock(&saved);
	thread.delay = true; /* more such calls may follow, or an exec */
	if (any && thread.wanted)
		agent_start();
	errno = saved_errno;
}
