/*
 * Reads and writes the memory of another process, as a debugger does: ./outsider PID ADDRESS PAGES SECONDS HOW
 *
 * HOW: mem (/proc/PID/mem), vm (process_vm_readv, process_vm_writev) or ptrace (PTRACE_PEEKDATA, PTRACE_POKEDATA). In
 * each page it writes one word that nobody else writes, and reads it again. Prints how many words it read or wrote, how
 * often that failed at first, how many words were wrong, and for how many microseconds it failed at most.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define WORD 3 /* of each page */
#define MANY 10000000UL

static pid_t pid;
static int mem = -1;
static enum { MEM, VM, PTRACE } how;
static unsigned long tries, failures;
static double longest;

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static bool try_read(uintptr_t at, uint64_t *value)
{
	struct iovec here = {value, 8}, there = {(void *)at, 8};

	if (how == MEM)
		return pread(mem, value, 8, (off_t)at) == 8;
	if (how == VM)
		return process_vm_readv(pid, &here, 1, &there, 1, 0) == 8;
	errno = 0;
	*value = (uint64_t)ptrace(PTRACE_PEEKDATA, pid, (void *)at, NULL);
	return !errno;
}

static bool try_write(uintptr_t at, uint64_t *value)
{
	struct iovec here = {value, 8}, there = {(void *)at, 8};

	if (how == MEM)
		return pwrite(mem, value, 8, (off_t)at) == 8;
	if (how == VM)
		return process_vm_writev(pid, &here, 1, &there, 1, 0) == 8;
	return !ptrace(PTRACE_POKEDATA, pid, (void *)at, (void *)*value);
}

static void until_done(bool (*call)(uintptr_t, uint64_t *), uintptr_t at, uint64_t *value)
{
	double began = 0, took;

	tries++;
	for (unsigned long n = 0; !call(at, value); n++) {
		if ((errno != EIO && errno != EFAULT) || n == MANY) {
			perror("outsider");
			exit(1);
		}
		if (!n) {
			failures++;
			began = now();
		}
	}
	took = began > 0 ? now() - began : 0;
	longest = took > longest ? took : longest;
}

int main(int argc, char **argv)
{
	uintptr_t start = argc == 6 ? strtoul(argv[2], NULL, 0) : 0;
	unsigned long pages = argc == 6 ? strtoul(argv[3], NULL, 10) : 0, wrong = 0;
	uint64_t *wrote, state = 88172645463325252u;
	char path[64];
	time_t end;

	if (argc != 6)
		return 2;
	pid = atoi(argv[1]);
	how = !strcmp(argv[5], "mem") ? MEM : !strcmp(argv[5], "vm") ? VM : PTRACE;
	snprintf(path, sizeof(path), "/proc/%d/mem", pid);
	mem = open(path, O_RDWR);
	if (mem < 0 || (how == PTRACE && (ptrace(PTRACE_ATTACH, pid, NULL, NULL) || waitpid(pid, NULL, 0) != pid)))
		return 3;
	wrote = calloc(pages, sizeof(*wrote));
	for (unsigned long i = 0; i < pages; i++)
		until_done(try_read, start + i * PAGE + WORD * 8, &wrote[i]);
	tries = failures = 0;
	longest = 0;
	for (end = time(NULL) + atoi(argv[4]); time(NULL) < end;)
		for (int k = 0; k < 100; k++) {
			uintptr_t at;
			uint64_t found;
			unsigned long i;

			state ^= state << 13;
			state ^= state >> 7;
			state ^= state << 17;
			i = state % pages;
			at = start + i * PAGE + WORD * 8;
			until_done(try_read, at, &found);
			wrong += found != wrote[i];
			/* One in eight is written: pages that never are the same are never merged. */
			if (state >> 61)
				continue;
			wrote[i] = found ^ state;
			until_done(try_write, at, &wrote[i]);
		}
	printf("%lu %lu %lu %.0f\n", tries, failures, wrong, longest * 1e6);
	return 0;
}
