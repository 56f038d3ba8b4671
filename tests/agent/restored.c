/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Has pipes on its lowest descriptors, writes numbers to each and reads them again, and has memory to merge. `restored
 * run FILE`: FILE gets how many numbers came, how many did not, and how often the memory was wrong. `restored rob PID
 * TID`: gives the thread TID of PID the descriptors of PID instead of its own. A process that is restored from a
 * checkpoint is like that: all threads have the descriptors of the first.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#define PIPES 16
#define WRITE_ENDS 100
#define FILE_FD 60
#define WORDS ((16UL << 20) / 8)

static void *write_numbers(void *unused)
{
	uint64_t next[PIPES] = {0};

	for (;;) {
		for (int i = 0; i < PIPES; i++)
			next[i] += write(WRITE_ENDS + i, &next[i], 8) == 8;
		usleep(500);
	}
	return unused;
}

static void make_pipes(void)
{
	int ends[PIPES][2];

	for (int i = 0; i < PIPES; i++) {
		if (pipe2(ends[i], O_NONBLOCK))
			exit(1);
		ends[i][0] = fcntl(ends[i][0], F_DUPFD, WRITE_ENDS + PIPES);
		if (dup2(ends[i][1], WRITE_ENDS + i) < 0)
			exit(1);
	}
	close_range(0, FILE_FD - 1, 0);
	for (int i = 0; i < PIPES; i++)
		if (dup2(ends[i][0], i) != i)
			exit(1);
	close_range(WRITE_ENDS + PIPES, ~0U, 0);
}

static int run(const char *path)
{
	uint64_t *memory = malloc(WORDS * 8), came = 0, lost = 0, wrong = 0, expected[PIPES] = {0}, number;
	struct pollfd p[PIPES];
	pthread_t thread;
	char line[100];
	int file = open(path, O_RDWR | O_CREAT, 0600);

	if (!memory || file < 0 || dup2(file, FILE_FD) != FILE_FD)
		return 1;
	for (uint64_t i = 0; i < WORDS; i++)
		memory[i] = i / 512 * 2654435761u;
	make_pipes();
	for (int i = 0; i < PIPES; i++)
		p[i] = (struct pollfd){.fd = i, .events = POLLIN};
	if (pthread_create(&thread, NULL, write_numbers, NULL))
		return 1;
	for (unsigned turn = 0;; turn++) {
		poll(p, PIPES, 100);
		for (int i = 0; i < PIPES; i++)
			while (read(i, &number, 8) == 8) {
				came++;
				lost += number - expected[i];
				expected[i] = number + 1;
			}
		if (turn % 64)
			continue;
		for (uint64_t i = 0; i < WORDS; i++)
			wrong += memory[i] != i / 512 * 2654435761u;
		memory[turn % WORDS] = memory[turn % WORDS]; /* as a program does */
		snprintf(line, sizeof(line), "%20lu %20lu %20lu\n", came, lost, wrong);
		if (pwrite(FILE_FD, line, strlen(line), 0) < 0)
			return 1;
	}
}

/* Has the thread, which is stopped in a system call, make another one. */
static long inject(pid_t tid, const struct user_regs_struct *at, long number, long a, long b, long c)
{
	struct user_regs_struct regs = *at;

	regs.rip -= 2; /* the instruction that it made its own with */
	regs.orig_rax = (unsigned long long)-1;
	regs.rax = (unsigned long long)number;
	regs.rdi = (unsigned long long)a;
	regs.rsi = (unsigned long long)b;
	regs.rdx = (unsigned long long)c;
	if (ptrace(PTRACE_SETREGS, tid, 0, &regs) || ptrace(PTRACE_SINGLESTEP, tid, 0, 0) ||
	    waitpid(tid, NULL, __WALL) != tid || ptrace(PTRACE_GETREGS, tid, 0, &regs))
		exit(1);
	return (long)regs.rax;
}

static int rob(pid_t pid, pid_t tid)
{
	struct user_regs_struct regs;
	char path[64];
	long at;

	if (ptrace(PTRACE_SEIZE, tid, 0, 0) || ptrace(PTRACE_INTERRUPT, tid, 0, 0) || waitpid(tid, NULL, __WALL) != tid ||
	    ptrace(PTRACE_GETREGS, tid, 0, &regs) || regs.orig_rax == (unsigned long long)-1)
		return 1;
	at = (long)((regs.rsp - 1024) & ~15ULL);
	if (inject(tid, &regs, SYS_close_range, 0, ~0U, 0))
		return 1;
	for (int i = 0; i < PIPES; i++) {
		struct iovec local = {path, sizeof(path)}, remote = {(void *)at, sizeof(path)};

		snprintf(path, sizeof(path), "/proc/%d/fd/%d", pid, i);
		if (process_vm_writev(tid, &local, 1, &remote, 1, 0) != sizeof(path) ||
		    inject(tid, &regs, SYS_open, at, O_RDWR | O_NONBLOCK, 0) != i)
			return 1;
	}
	regs.orig_rax = (unsigned long long)-1;
	regs.rax = (unsigned long long)-EINTR;
	return ptrace(PTRACE_SETREGS, tid, 0, &regs) || ptrace(PTRACE_DETACH, tid, 0, 0);
}

int main(int argc, char **argv)
{
	if (argc == 3 && !strcmp(argv[1], "run"))
		return run(argv[2]);
	return argc == 4 ? rob(atoi(argv[2]), atoi(argv[3])) : 1;
}
