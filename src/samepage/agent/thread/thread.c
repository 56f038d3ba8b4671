/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How the agent's thread begins and ends.
 *
 * It begins wherever the application first has something to merge: inside malloc and its locks, inside dlopen, in a
 * signal handler, before main. So libc's pthread_create, which allocates and takes locks, is not to be had. The thread is
 * made by clone(2) itself, on a stack of its own, and libc does not know of it: what libc does for a process of
 * one thread it goes on doing, and what it does to all threads (setuid(2) and its kin) does not reach this one (identity.c).
 * In exchange the thread may use nothing of libc (system.c), but for errno, for which it has a place.
 */
#include "base/area.h"
#include "base/lock.h"
#include "base/real.h"
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
#define WORTH_A_THREAD (16UL << 20) /* bytes that nobody named, mapped or made writable so far */
#define END_TRIES 100		    /* of 100 ms: how long is waited for the thread's end */
#define MASK_WORDS (8192 / 64)
#define NODES_MAX 1024
#define TIMER_SLACK_NS 50000L

struct thread thread;
struct mutex life;

/* ---- stack and thread-local storage --------------------------------------------------------------------- */

/* Compiled code finds errno at a fixed distance from the thread pointer, and at that some words of libc's. Of what libraries
 * that were there from the start keep for each thread the agent uses errno and nothing else. */
static struct {
	char *map; /* kept when the thread ends */
	char *stack_top, *end;
	void *thread_pointer;
} room;

/* [guard page | stack | errno, if it is below | the words, and errno, if it is above]. False: there is no memory. */
static bool make_room(void)
{
	uintptr_t self = (uintptr_t)arch_thread_pointer(), place = (uintptr_t)&errno;
	uintptr_t below = place < self ? self - place : 0, above = place < self ? 0 : place - self + sizeof(errno);
	size_t size;

	if (room.map)
		return true;
	if (below > TLS_MAX || above > TLS_MAX)
		return false; /* no libc that we know */
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
	int policy; /* of memory; -1: the kernel has none */
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
 * The thread inherits how the one runs that happened to allocate first. That may be one of real time, whose share of a CPU
 * this one must not take; one pinned to a CPU on which something spins, where this one would sleep with the lock in its
 * hands; or one that takes memory from a far node.
 */
void thread_settle(void)
{
	static const int no_priority;
	long nice = raw_syscall(SYS_getpriority, PRIO_PROCESS, getpid(), 0, 0, 0, 0);

	raw_syscall(SYS_sched_setscheduler, 0, SCHED_OTHER, (long)&no_priority, 0, 0, 0);
	if (nice > 0) /* the system call says 20 - nice */
		raw_syscall(SYS_setpriority, PRIO_PROCESS, 0, 20 - nice, 0, 0, 0);
	if (defaults.affinity_bytes > 0)
		raw_syscall(SYS_sched_setaffinity, 0, defaults.affinity_bytes, (long)defaults.affinity, 0, 0, 0);
	if (defaults.policy >= 0)
		raw_syscall(SYS_set_mempolicy, defaults.policy, (long)defaults.nodes, NODES_MAX, 0, 0, 0);
	raw_syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, 0, 0, 0, 0);
	real.prctl(PR_SET_TIMERSLACK, TIMER_SLACK_NS, 0, 0, 0);
	real.prctl(PR_SET_NAME, "samepage", 0, 0, 0);
}

/* ---- begin ---------------------------------------------------------------------------------------------- */

/* Not CLONE_FS: a shared fs_struct would keep the application from setns(2) and hold its working directory. */
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
	/* What shares our memory and is another process (vfork) can have no thread in it that outlives it. */
	if (thread.owner != getpid())
		return -EPERM;
	if (!make_room())
		return -ENOMEM;
	memset(room.stack_top, 0, (size_t)(room.end - room.stack_top));
	arch_tcb_init(room.thread_pointer);
	atomic_store(&thread.stop, false);
	atomic_store(&thread.state, RUNNING);
	mmap_lock_watch(forked_unseen);
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

/* Has the thread end, and waits. It looks up from whatever it waits for itself, and a step takes milliseconds; what else may
 * hold it up (a page of the application's that does not come) must not hold up the caller for ever. */
static void end_thread(void)
{
	const struct timespec step = {.tv_nsec = 100000000};
	uint32_t tid;

	atomic_store(&thread.stop, true);
	for (int i = 0; (tid = atomic_load(&thread.tid)) && i < END_TRIES; i++) {
		thread_wake();
		/* Woken by the kernel, which takes the word for one that is shared: as futex_wait() does. */
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
		/* One that did not end in time is told to, and nothing is started beside it. */
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
	if (thread.owner != getpid())
		return false;
	/* Not by holding `life`: a thread that waits for it has all signals blocked, and libc waits for every thread to take one
	 * when the process changes its user. */
	atomic_fetch_add(&thread.away, 1);
	stop_thread(IDLE); /* waits for one that is being started */
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
