/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A process whose memory is what its arguments say, advised MADV_MERGEABLE page by page of one mapping:
 *
 *	d512@1   512 pages that differ from one another; the same for the same number after the @
 *	z400     400 pages of zeros, written
 *	c1000@7  1000 pages that are equal
 *	v100     100 pages that are written with something new all the time
 *
 * It says "ready", then does what it is told on standard input, and says "done": "fork" makes a child that waits, too;
 * "rewrite N" has all children write the first N pages with what is in them. It ends with its standard input.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL

static volatile uint64_t *volatile_pages;
static size_t nr_volatile;
static char *memory;
static size_t nr_pages;

static void fill(char *page, uint64_t seed)
{
	for (size_t i = 0; i < PAGE; i += 8, seed = seed * 6364136223846793005u + 1442695040888963407u)
		memcpy(page + i, &seed, 8);
}

static void add(const char *word, size_t at, size_t n)
{
	const char *mark = strchr(word, '@');
	uint64_t seed = mark ? strtoull(mark + 1, NULL, 10) : 0;
	char *page = memory + at * PAGE;

	for (size_t i = 0; i < n; i++, page += PAGE)
		if (word[0] == 'z')
			memset(page, 0, PAGE);
		else
			fill(page, seed << 32 | (word[0] == 'c' ? 1 : i + 1));
	if (word[0] == 'v') {
		volatile_pages = (uint64_t *)(memory + at * PAGE);
		nr_volatile = n;
	}
}

static void *keep_writing(void *unused)
{
	const struct timespec nap = {.tv_nsec = 500000};
	uint64_t n = (uint64_t)getpid() << 40;

	(void)unused;
	for (;; nanosleep(&nap, NULL))
		for (size_t i = 0; i < nr_volatile; i++)
			volatile_pages[i * PAGE / 8] = ++n;
	return NULL;
}

static int *rewrite_pages; /* shared with the children, who rewrite so many when they get SIGUSR1 */

static void child(void)
{
	sigset_t usr1;
	int got;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	sigemptyset(&usr1);
	sigaddset(&usr1, SIGUSR1);
	for (;;) {
		sigwait(&usr1, &got);
		for (volatile char *p = memory; p < memory + *rewrite_pages * PAGE; p += PAGE)
			*p = *p;
		kill(getppid(), SIGUSR1);
	}
}

int main(int argc, char **argv)
{
	pid_t children[16];
	int nr_children = 0, got;
	pthread_t writer;
	char line[64];
	size_t at = 0;
	sigset_t usr1;

	sigemptyset(&usr1);
	sigaddset(&usr1, SIGUSR1);
	sigprocmask(SIG_BLOCK, &usr1, NULL);
	for (int i = 1; i < argc; i++)
		nr_pages += strtoul(argv[i] + 1, NULL, 10);
	rewrite_pages = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	memory = mmap(NULL, nr_pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	madvise(memory, nr_pages * PAGE, MADV_NOHUGEPAGE);
	for (int i = 1; i < argc; i++) {
		size_t n = strtoul(argv[i] + 1, NULL, 10);

		add(argv[i], at, n);
		at += n;
	}
	if (madvise(memory, nr_pages * PAGE, MADV_MERGEABLE)) {
		perror("MADV_MERGEABLE");
		return 1;
	}
	if (nr_volatile)
		pthread_create(&writer, NULL, keep_writing, NULL);
	puts("ready");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		if (!strcmp(line, "fork\n")) {
			children[nr_children] = fork();
			if (!children[nr_children])
				child();
			nr_children++;
		} else if (sscanf(line, "rewrite %d", rewrite_pages) == 1) {
			for (int i = 0; i < nr_children; i++) {
				kill(children[i], SIGUSR1);
				sigwait(&usr1, &got);
			}
		}
		puts("done");
		fflush(stdout);
	}
	for (int i = 0; i < nr_children; i++)
		kill(children[i], SIGKILL);
	return 0;
}
