/* SPDX-License-Identifier: Apache-2.0 */
/* Starts and ends the agent's thread in difficult situations, one for each argument. Prints what the test asserts. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef PR_SET_MEMORY_MERGE
#define PR_SET_MEMORY_MERGE 67
#endif
#define SIZE (4UL << 20)

static void nap(long ms)
{
	nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000}, NULL);
}

static double now(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* Not free(malloc(SIZE)), of which a compiler leaves nothing. */
static void touch_some(size_t size)
{
	volatile char *p = malloc(size);

	*p = 1;
	free((void *)p);
}

/* The agent's thread, or 0. */
static pid_t agent_thread(void)
{
	DIR *tasks = opendir("/proc/self/task");
	pid_t found = 0;

	for (struct dirent *e; (e = readdir(tasks));) {
		char path[300], name[32] = "";
		FILE *comm;

		snprintf(path, sizeof(path), "/proc/self/task/%s/comm", e->d_name);
		comm = fopen(path, "r");
		if (comm && fgets(name, sizeof(name), comm) && !strcmp(name, "samepage\n"))
			found = atoi(e->d_name);
		if (comm)
			fclose(comm);
	}
	closedir(tasks);
	return found;
}

static pid_t await_agent(void)
{
	pid_t tid = 0;

	for (int i = 0; !tid && i < 500; i++, nap(10))
		tid = agent_thread();
	return tid;
}

static unsigned char *begin(void)
{
	unsigned char *p = aligned_alloc(4096, SIZE);

	memset(p, 1, SIZE);
	if (!await_agent())
		puts("no agent");
	nap(100);
	return p;
}

static bool allowed(void)
{
	struct sock_filter code[] = {BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
	struct sock_fprog filter = {1, code};

	return !prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) && !prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter, 0, 0);
}

/* What wants the agent's thread to do something or to go, while the service that it joined does not answer. */
static void silent_service(void)
{
	unsigned char *p = begin();
	double wall = now(CLOCK_MONOTONIC), cpu;

	printf("unmerge %d\n", madvise(p, SIZE, MADV_UNMERGEABLE));
	printf("merge any %d\n", prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0));
	printf("merge none %d\n", prctl(PR_SET_MEMORY_MERGE, 0, 0, 0, 0));
	printf("setns %d", setns(-1, 0));
	printf(" %s\n", strerror(errno));
	printf("unshare %d\n", unshare(CLONE_NEWUSER));
	free(begin());
	printf("seccomp %d\n", allowed());
	printf("in time %d\n", now(CLOCK_MONOTONIC) - wall < 3);
	cpu = now(CLOCK_PROCESS_CPUTIME_ID);
	nap(300);
	printf("idle %d\n", now(CLOCK_PROCESS_CPUTIME_ID) - cpu < 0.1);
	fflush(stdout);
	alarm(5);
	syscall(SYS_exit, 0);
}

/* The same in a process that changed its user, which may not open what is its own in /proc. */
static void as_nobody(void)
{
	unsigned char *p = begin();

	if (setuid(65534))
		perror("setuid");
	printf("merged before: unmerge %d, whole %d\n", madvise(p, SIZE, MADV_UNMERGEABLE), p[0] + p[SIZE - 1] == 2);
	silent_service();
}

/* The main thread ends by an inline system call, which only the agent's can notice: it must not be the last. */
static void inline_exit(void)
{
	begin();
	puts("exit");
	fflush(stdout);
	alarm(10);
	__asm__ volatile("syscall" : : "a"(SYS_exit), "D"(0) : "rcx", "r11", "memory");
}

#ifdef OWN_MALLOC
/* Memory for a heap, by the calls that a malloc of the program's own makes with its lock held. */
static atomic_flag heap_lock = ATOMIC_FLAG_INIT;
static char *heap, *heap_end;

static void *own_alloc(size_t size)
{
	char *p;

	while (atomic_flag_test_and_set(&heap_lock))
		;
	size = (size + 15) & ~15UL;
	if ((size_t)(heap_end - heap) < size) {
		size_t more = size > 1 << 20 ? size : 1 << 20;

		heap = mmap(NULL, more, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		heap_end = heap + more;
	}
	p = heap;
	heap += size;
	atomic_flag_clear(&heap_lock);
	return p;
}

void *malloc(size_t size)
{
	return own_alloc(size);
}

void *calloc(size_t n, size_t size)
{
	return own_alloc(n * size);
}

void *realloc(void *p, size_t size)
{
	void *q = own_alloc(size);

	if (p)
		memcpy(q, p, size); /* no more than was mapped: the heap only grows */
	return q;
}

void free(void *p)
{
	(void)p;
}
#endif

/* All memory is mapped under the allocator's lock, the first before main. */
static void all_memory(char *self, char *then)
{
	if (prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0) || execl(self, self, then, NULL))
		perror("all memory");
}

static void inside_malloc(void)
{
	alarm(10);
	for (int i = 0; i < 64; i++) /* each too small for the agent to serve it; together worth a thread */
		memset(malloc(SIZE / 8), 1, SIZE / 8);
	/* tcmalloc takes its memory from the break, which nobody sees. */
	mmap(NULL, 4 * SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	printf("agent %d\n", await_agent() > 0);
}

/* Told to merge all of its memory by whoever started it. */
static void small(void)
{
	pid_t pid;
	int status;

	mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	pid = fork();
	if (!pid) {
		nap(200);
		_exit(agent_thread() > 0);
	}
	waitpid(pid, &status, 0);
	printf("4 MiB: %d %d\n", agent_thread() > 0, status);
	mmap(NULL, 4 * SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	printf("20 MiB: %d\n", await_agent() > 0);
	pid = fork();
	if (!pid)
		_exit(await_agent() > 0);
	waitpid(pid, &status, 0);
	printf("a child: %d\n", WEXITSTATUS(status));
}

/* The thread is as the process was started, whatever the one is that allocates first. */
static void *allocate_oddly(void *arg)
{
	cpu_set_t one;

	CPU_ZERO(&one);
	CPU_SET(0, &one);
	sched_setaffinity(0, sizeof(one), &one);
	setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), 7);
	prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);
	syscall(SYS_ioprio_set, 1, 0, 2 << 13 | 7);
	syscall(SYS_set_mempolicy, 2 /* MPOL_BIND */, &(unsigned long){1}, 64L);
	if (sched_setscheduler(0, SCHED_FIFO, &(struct sched_param){.sched_priority = 10}))
		perror("SCHED_FIFO");
	touch_some(SIZE);
	*(pid_t *)arg = await_agent();
	return NULL;
}

static void settings(void)
{
	cpu_set_t ours, theirs;
	pthread_t thread;
	pid_t agent;

	sched_getaffinity(0, sizeof(ours), &ours);
	pthread_create(&thread, NULL, allocate_oddly, &agent);
	pthread_join(thread, NULL);
	sched_getaffinity(agent, sizeof(theirs), &theirs);
	printf("agent %d\n", agent > 0);
	printf("policy %d\n", sched_getscheduler(agent));
	printf("same CPUs %d\n", CPU_EQUAL(&ours, &theirs));
	printf("nice %d\n", getpriority(PRIO_PROCESS, (id_t)agent));
	printf("I/O priority %ld\n", syscall(SYS_ioprio_get, 1, agent) >> 13);
}

static volatile sig_atomic_t got;

static void allocate(int number)
{
	(void)number;
	touch_some(SIZE);
	got = 1;
}

/* In a signal handler, in a child that shares our memory, in a child's child. */
static void odd_places(void)
{
	pid_t pid = vfork();
	int status;

	if (!pid) {
		touch_some(SIZE);
		_exit(0);
	}
	waitpid(pid, &status, 0);
	printf("vfork %d\n", status);
	signal(SIGUSR1, allocate);
	raise(SIGUSR1);
	printf("handler %d agent %d\n", got, await_agent() > 0);
	pid = vfork();
	if (!pid) { /* the thread is its parent's, and stays */
		setns(-1, 0);
		_exit(0);
	}
	waitpid(pid, &status, 0);
	printf("vfork %d agent %d\n", status, agent_thread() > 0);
	pid = (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
	if (!pid) {
		touch_some(2 * SIZE); /* not the block that is kept for the next one of its size */
		_exit(await_agent() > 0 ? 0 : 1);
	}
	waitpid(pid, &status, 0);
	printf("fork %d\n", status);
}

/* Unmerging, which the thread is called for, while it is ended and begun again all the time. */
static _Atomic bool over;

static void *call_always(void *arg)
{
	unsigned char *p = aligned_alloc(4096, SIZE);
	long *calls = arg;

	while (!over) {
		memset(p, 3, SIZE);
		if (madvise(p, SIZE, MADV_MERGEABLE) || madvise(p, SIZE, MADV_UNMERGEABLE) || p[SIZE / 2] != 3)
			printf("wrong: %s\n", strerror(errno));
		++*calls;
	}
	return NULL;
}

static void calls_and_ends(void)
{
	pthread_t threads[2];
	long calls[2] = {0};
	double until = now(CLOCK_MONOTONIC) + 3;

	alarm(30);
	for (int i = 0; i < 2; i++)
		pthread_create(&threads[i], NULL, call_always, &calls[i]);
	while (now(CLOCK_MONOTONIC) < until)
		setns(-1, 0);
	over = true;
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	printf("calls %d\n", calls[0] > 0 && calls[1] > 0);
}

/* The main thread has ended, and /proc/PID/maps is empty. */
static unsigned char *before;

static void *without_leader(void *arg)
{
	unsigned char *last = before + SIZE - 4096;

	nap(200);
	munmap(last, 4096);
	printf("mprotect %d\n", mprotect(before, SIZE, PROT_READ | PROT_WRITE)); /* not all of it is mapped */
	mmap(last, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	printf("discard %d", madvise(before, SIZE, MADV_DONTNEED));
	printf(" leaves %d\n", before[0] + before[SIZE - 1]);
	before = begin();
	printf("unmerge %d\n", madvise(before, SIZE, MADV_UNMERGEABLE));
	printf("whole %d\n", before[0] == 1 && before[SIZE - 1] == 1);
	fflush(stdout);
	exit(0);
	return arg;
}

static void leaderless(void)
{
	pthread_t thread;

	before = begin();
	pthread_create(&thread, NULL, without_leader, NULL);
	pthread_exit(NULL);
}

/* What the agent has mapped for itself by then is the program's when that comes to its limit. */
static void fills_its_limit(void)
{
	struct rlimit to = {400UL << 20, 400UL << 20};
	int n = 0;

	setrlimit(RLIMIT_AS, &to);
	for (void *p; n < 400 && (p = malloc(1UL << 20)); n++) {
		memset(p, 1, 1UL << 20);
		if (n == 100)
			nap(1000);
	}
	printf("all but little %d\n", n > 384);
}

static void *map(size_t size)
{
	return mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

/* The same for what it maps itself, and for one mapping that grows; not for what is too much in any case. */
static void maps_to_its_limit(bool grows)
{
	const size_t mib = 1UL << 20;
	struct rlimit to = {400 * mib, 400 * mib};
	size_t size = 100 * mib;
	void *p;

	setrlimit(RLIMIT_AS, &to);
	memset(malloc(8 * mib), 1, 8 * mib);
	nap(1000);
	printf("too much %d\n", map(1UL << 40) == MAP_FAILED);
	for (p = map(size); p != MAP_FAILED; size += mib)
		p = grows ? mremap(p, size, size + mib, MREMAP_MAYMOVE) : map(mib);
	printf("all but little %d\n", size > 376 * mib);
}

/* Every signal that a program can block and wait for comes from another process, and is there. */
static void waits_for_signals(void)
{
	const struct timespec moment = {.tv_nsec = 300000000};
	int lost = 0;
	sigset_t all;

	sigfillset(&all);
	sigprocmask(SIG_BLOCK, &all, NULL);
	begin();
	for (int i = 1; i <= SIGRTMAX; i++) {
		sigset_t one;
		pid_t child;

		sigemptyset(&one);
		if (i == SIGKILL || i == SIGSTOP || i == SIGCHLD || (i > SIGSYS && i < SIGRTMIN) || sigaddset(&one, i))
			continue;
		child = fork();
		if (!child) {
			kill(getppid(), i);
			_exit(0);
		}
		waitpid(child, NULL, 0);
		nap(5);
		lost += sigtimedwait(&one, NULL, &moment) != i;
	}
	printf("lost %d\n", lost);
}

int main(int argc, char **argv)
{
	const char *how = argc > 1 ? argv[1] : "";

	if (!strcmp(how, "silent-service"))
		silent_service();
	if (!strcmp(how, "fills-its-limit"))
		fills_its_limit();
	if (!strcmp(how, "maps-to-its-limit"))
		maps_to_its_limit(false);
	if (!strcmp(how, "grows-to-its-limit"))
		maps_to_its_limit(true);
	if (!strcmp(how, "waits-for-signals"))
		waits_for_signals();
	if (!strcmp(how, "as-nobody"))
		as_nobody();
	if (!strcmp(how, "inline-exit"))
		inline_exit();
	if (!strcmp(how, "inside-malloc"))
		all_memory(argv[0], "inside-malloc-again");
	if (!strcmp(how, "inside-malloc-again"))
		inside_malloc();
	if (!strcmp(how, "small"))
		all_memory(argv[0], "small-again");
	if (!strcmp(how, "small-again"))
		small();
	if (!strcmp(how, "leaderless"))
		leaderless();
	if (!strcmp(how, "settings"))
		settings();
	if (!strcmp(how, "odd-places"))
		odd_places();
	if (!strcmp(how, "calls-and-ends"))
		calls_and_ends();
	return 0;
}
