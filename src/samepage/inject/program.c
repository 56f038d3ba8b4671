/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a process is that is to make calls: which program it runs, and whether it is under seccomp. It may change both
 * until it is held, and settle.c may take a second. (Another of its threads can put all of them under a filter even then,
 * by SECCOMP_FILTER_FLAG_TSYNC.)
 */
#define _GNU_SOURCE
#include "inject.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

bool read_proc(pid_t pid, const char *name, char *text, size_t size)
{
	char path[64];
	ssize_t n = -1;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/%s", pid, name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd >= 0) {
		n = read(fd, text, size - 1);
		close(fd);
	}
	text[n > 0 ? n : 0] = '\0';
	return n > 0;
}

/* Where the stack of the process begins: field 28 of proc_pid_stat(5). 0: we may not know. */
static uint64_t start_of_stack(pid_t pid)
{
	char text[1024];
	uint64_t start = 0;
	const char *p;

	if (!read_proc(pid, "stat", text, sizeof(text)))
		return 0;
	p = strrchr(text, ')'); /* field 2, a name that may hold anything, ends with it */
	for (int field = 2; p && field < 28; field++)
		p = strchr(p + 1, ' ');
	if (p)
		sscanf(p, "%lu", &start);
	return start;
}

void note_program(struct tracee *t)
{
	t->program = start_of_stack(t->pid);
}

enum inject_error check_program(const struct tracee *t)
{
	char text[4096];

	if (start_of_stack(t->pid) != t->program)
		return INJECT_GONE;
	if (!read_proc(t->pid, "status", text, sizeof(text)))
		return INJECT_GONE;
	/* A kernel without seccomp has no such line. */
	return !strstr(text, "\nSeccomp:") || strstr(text, "\nSeccomp:\t0") ? INJECT_OK : INJECT_FILTERED;
}

struct waits call_of(pid_t pid)
{
	struct waits w = {0};
	uint64_t *arg = w.arg;
	char text[256];

	if (!read_proc(pid, "syscall", text, sizeof(text)) ||
	    sscanf(text, "%ld %lx %lx %lx %lx %lx %lx %lx %lx", &w.nr, &arg[0], &arg[1], &arg[2], &arg[3], &arg[4],
		   &arg[5], &w.sp, &w.pc) != 9)
		w.nr = -1;
	return w;
}

/* A mask of signals in the status of a process. */
static uint64_t signals(const char *status, const char *name)
{
	const char *p = strstr(status, name);

	return p ? strtoull(p + strlen(name), NULL, 16) : 0;
}

bool is_signalled(pid_t pid)
{
	char text[4096];

	if (!read_proc(pid, "status", text, sizeof(text)))
		return false;
	return (signals(text, "\nSigPnd:\t") | signals(text, "\nShdPnd:\t")) & ~signals(text, "\nSigBlk:\t") &
	       signals(text, "\nSigCgt:\t");
}
