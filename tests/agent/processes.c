/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Makes processes in every way there is, with memory that may be merged, and prints what they saw. The output is the
 * same with and without samepage.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SIZE (4UL << 20)

extern char **environ;
static unsigned char *block;

static void nap(long ms)
{
	nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000}, NULL);
}

static bool is_filled(const unsigned char *p, unsigned char with)
{
	for (size_t i = 0; i < SIZE; i += 512)
		if (p[i] != (unsigned char)(with + i / 4096 % 200))
			return false;
	return true;
}

static void fill(unsigned char *p, unsigned char with)
{
	for (size_t i = 0; i < SIZE; i += 4096)
		memset(p + i, with + (unsigned char)(i / 4096 % 200), 4096);
}

static bool signals_are_open(void)
{
	sigset_t mask;

	sigprocmask(SIG_SETMASK, NULL, &mask);
	for (int i = 1; i < 32; i++)
		if (sigismember(&mask, i) == 1)
			return false;
	return true;
}

/* What every child does: sees its parent's memory, writes it, allocates, discards. */
static int child(void *arg)
{
	unsigned char *more;

	(void)arg;
	if (!is_filled(block, 1) || !signals_are_open())
		return 1;
	fill(block, 2);
	more = malloc(SIZE);
	if (!more)
		return 2;
	fill(more, 3);
	if (!is_filled(block, 2) || !is_filled(more, 3))
		return 3;
	free(more);
	if (madvise(block, SIZE, MADV_DONTNEED) || block[0] || block[SIZE - 1])
		return 4;
	return 0;
}

static void report(const char *how, pid_t pid)
{
	int status = -1;

	if (pid <= 0)
		printf("%s: %s\n", how, strerror(errno));
	else if (waitpid(pid, &status, __WALL) != pid)
		printf("%s: lost\n", how);
	else
		printf("%s: status %d, parent %s, signals %s\n", how, status, is_filled(block, 1) ? "whole" : "damaged",
		       signals_are_open() ? "open" : "blocked");
	fflush(stdout);
}

static void forks(void)
{
	char *stack =
		(char *)mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) + (1 << 20);
	struct {
		uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls;
	} args = {.exit_signal = SIGCHLD};
	pid_t pid;

	pid = fork();
	if (!pid)
		_exit(child(NULL));
	report("fork", pid);
	pid = _Fork();
	if (!pid)
		_exit(child(NULL));
	report("_Fork", pid);
	report("clone", clone(child, stack, SIGCHLD, NULL));
	report("clone without a stack", clone(child, NULL, SIGCHLD, NULL));
	pid = (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
	if (!pid)
		_exit(child(NULL));
	report("SYS_clone", pid);
	pid = (pid_t)syscall(SYS_clone3, &args, sizeof(args));
	if (!pid)
		_exit(child(NULL));
	report("SYS_clone3", pid);
	pid = fork();
	if (!pid) { /* a child's child */
		pid = fork();
		if (!pid)
			_exit(child(NULL));
		report("fork of a fork", pid);
		_exit(0);
	}
	report("its parent", pid);
}

static int run_true(void *arg)
{
	(void)arg;
	execl("/bin/true", "true", NULL);
	return 127;
}

static void spawns(void)
{
	char *stack =
		(char *)mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) + (1 << 20);
	char *argv[] = {"true", NULL};
	pid_t pid = -1;
	FILE *pipe;

	if (posix_spawn(&pid, "/bin/true", NULL, NULL, argv, environ))
		puts("posix_spawn failed");
	report("posix_spawn", pid);
	pid = vfork();
	if (!pid) {
		execl("/bin/true", "true", NULL);
		_exit(127);
	}
	report("vfork", pid);
	report("clone like vfork", clone(run_true, stack, CLONE_VM | CLONE_VFORK | SIGCHLD, NULL));
	printf("system: %d\n", system("exit 3"));
	pipe = popen("echo from a pipe", "r");
	for (int c; (c = fgetc(pipe)) != EOF;)
		putchar(c);
	printf("pclose: %d\n", pclose(pipe));
}

static int answer_in[2];

static void in_background(void)
{
	pid_t pid = fork();
	char ok = 0;

	if (!pid) {
		if (daemon(0, 1))
			_exit(1);
		for (int fd = 3; fd < 256; fd++) /* closefrom(3), but for the one */
			if (fd != answer_in[1])
				close(fd);
		nap(100);
		ok = child(NULL) ? 'n' : 'y';
		if (write(answer_in[1], &ok, 1) != 1)
			_exit(1);
		_exit(0);
	}
	waitpid(pid, NULL, 0);
	if (read(answer_in[0], &ok, 1) != 1)
		ok = '?';
	printf("daemon that closed all: %c\n", ok);
}

/* Each needs a process of one thread. */
static void alone(void)
{
	int good = 0;

	for (int i = 0; i < 20; i++) {
		pid_t pid = fork();
		int status;

		if (!pid) {
			unsigned char *p = malloc(SIZE);

			fill(p, 1);
			nap(i * 3); /* in whatever state the agent is by then */
			if (unshare(CLONE_NEWUSER))
				_exit(errno);
			nap(i);
			_exit(is_filled(p, 1) ? 0 : 254);
		}
		if (waitpid(pid, &status, 0) == pid && !status)
			good++;
		else
			printf("unshare: %s\n", strerror(WEXITSTATUS(status)));
	}
	printf("unshare: %d of 20\n", good);
	printf("setns: %d", setns(-1, 0));
	printf(" %s\n", strerror(errno));
}

static void *outlive(void *arg)
{
	nap(100);
	return arg;
}

/* A process lives as long as any of its threads, and no longer. */
static void last_thread(void)
{
	for (int i = 0; i < 2; i++) {
		pid_t pid = fork();
		pthread_t thread;

		if (!pid) {
			alarm(10); /* SIGALRM: it did not end */
			free(malloc(SIZE));
			nap(50);
			pthread_create(&thread, NULL, outlive, NULL);
			if (i)
				syscall(SYS_exit, 0);
			pthread_exit(NULL);
		}
		report(i ? "SYS_exit" : "pthread_exit", pid);
	}
}

/* A filter that kills for whatever the agent's thread would call next. */
static void filtered(void)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_recvmsg, 2, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_poll, 1, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_ppoll, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog filter = {sizeof(code) / sizeof(code[0]), code};

	for (int i = 0; i < 2; i++) {
		pid_t pid = fork();

		if (!pid) {
			free(malloc(SIZE));
			nap(50);
			if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ||
			    (i ? syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &filter)
			       : prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter, 0, 0)))
				_exit(9);
			nap(50);
			_exit(child(NULL));
		}
		report(i ? "seccomp" : "PR_SET_SECCOMP", pid);
	}
}

static void *answer_fault(void *arg)
{
	static char page[4096];
	struct uffd_msg msg;
	int fd = *(int *)arg;

	memset(page, 77, sizeof(page));
	if (read(fd, &msg, sizeof(msg)) == sizeof(msg))
		ioctl(fd, UFFDIO_COPY,
		      &(struct uffdio_copy){
			      .dst = msg.arg.pagefault.address & ~4095ULL, .src = (uintptr_t)page, .len = 4096});
	return NULL;
}

/* The program's own userfaultfd, on memory that may be merged. */
static void own_userfaultfd(void)
{
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
	struct uffdio_api api = {.api = UFFD_API};
	struct uffdio_register reg = {.range = {(uintptr_t)block, SIZE}, .mode = UFFDIO_REGISTER_MODE_MISSING};
	pthread_t thread;

	if (fd < 0 || ioctl(fd, UFFDIO_API, &api)) {
		puts("no userfaultfd");
		return;
	}
	printf("register: %d\n", ioctl(fd, UFFDIO_REGISTER, &reg));
	printf("whole: %d\n", is_filled(block, 1));
	printf("discard: %d\n", madvise(block, SIZE, MADV_DONTNEED));
	pthread_create(&thread, NULL, answer_fault, &fd);
	printf("filled with %d\n", block[4096]);
	pthread_join(thread, NULL);
	close(fd);
}

int main(void)
{
	setvbuf(stdout, NULL, _IOLBF, 0);
	if (pipe(answer_in) || !(block = aligned_alloc(4096, SIZE)))
		return 1;
	fill(block, 1);
	nap(200); /* time to be merged, where there is a service */
	forks();
	spawns();
	in_background();
	alone();
	last_thread();
	filtered();
	own_userfaultfd();
	return 0;
}
