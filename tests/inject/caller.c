/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Starts a program that checks itself (checked.c, waits.c), makes calls in its name, and tells it to end: all of
 * tests/inject that can be run where there is no Python, as in an initrd of another processor's.
 *
 *	caller [-k] TIMES PROGRAM [ARGUMENT]...
 *
 * -k: who makes the calls is killed, so many times. Ends with the status of the program.
 */
#define _GNU_SOURCE
#include "../check.h"
#include "inject.h"

#include <signal.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/wait.h>

int samepage_inject_calls(pid_t pid, int pidfd, struct inject_call *call, size_t n);

static int in[2], out[2];

static pid_t start(char **command)
{
	char ready[6];
	pid_t pid;

	CHECK(!pipe(in) && !pipe(out));
	pid = fork();
	if (!pid) {
		dup2(in[0], 0);
		dup2(out[1], 1);
		close(in[1]);
		execv(command[0], command);
		_exit(127);
	}
	CHECK(read(out[0], ready, sizeof(ready)) == sizeof(ready));
	return pid;
}

static int call(pid_t pid)
{
	struct inject_call calls[] = {{SYS_getpid, {0}, 0}, {SYS_close, {12345}, 0}, {SYS_getpid, {0}, 0}};
	int pidfd = (int)syscall(SYS_pidfd_open, pid, 0), err = samepage_inject_calls(pid, pidfd, calls, 3);

	close(pidfd);
	CHECK(err || (calls[0].ret == pid && calls[1].ret == -EBADF));
	return err;
}

static void be_killed(pid_t pid)
{
	pid_t caller = fork();

	if (!caller)
		for (;;)
			call(pid);
	usleep((useconds_t)rand() % 60000 + 2000);
	CHECK(!kill(caller, SIGKILL) && waitpid(caller, NULL, 0) == caller);
}

int main(int argc, char **argv)
{
	bool kills = argc > 1 && !strcmp(argv[1], "-k");
	char **command = argv + (kills ? 3 : 2);
	int times = atoi(command[-1]), refused = 0, status;
	pid_t pid = start(command);

	usleep(100000);
	for (int i = 0; i < times; i++) {
		if (kills)
			be_killed(pid);
		else
			refused += call(pid) != INJECT_OK;
		CHECK(!waitpid(pid, &status, WNOHANG));
	}
	usleep(100000);
	CHECK(write(in[1], "x", 1) == 1 && !close(in[1]) && waitpid(pid, &status, 0) == pid);
	printf("%s %s: %d times, %d refused, status %d\n", command[0], argv[argc - 1], times, refused, status);
	return status != 0;
}
