/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Has tens of thousands of small mappings and blocks, with a guard page beside each mapping. While they are merged,
 * threads write, protect, discard, move, resize, free and allocate them again, and inherit them over forks. Each
 * belongs to one thread, which knows what every page must hold.
 *
 * Usage: crowd SECONDS SLOTS [SEED]. Exit status 0, or 1 after saying what was wrong.
 */
#define _GNU_SOURCE
#include <errno.h>
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
#define WORDS (PAGE / 8)
#define PAGES_MAX 8
#define BLOCK_PAGES 16 /* 64 KiB: with SAMEPAGE_MIN_ALLOC=65536 a block of the agent's */
#define THREADS 4
#define PATTERNS 5 /* and one of each page's own */
#define RW (PROT_READ | PROT_WRITE)

enum op { WRITE, AGAIN, GUARD, DISCARD, MOVE, RESIZE, OVER, ADVISE, BLOCK, FORK, NR_OPS };
static const char *const names[] = {"written", "mapped again", "protected", "discarded", "moved",
				    "resized", "mapped over",  "advised",   "blocks",	 "forks"};

struct slot {
	unsigned char *p;
	uint32_t n; /* pages */
	int block;  /* of malloc's */
	uint32_t holds[BLOCK_PAGES];
};

static struct slot *slots;
static size_t nr_slots;
static volatile int stop;
static unsigned long done[THREADS][NR_OPS];
static _Thread_local const char *doing = "nothing";

static void die(const char *what)
{
	perror(what);
	_exit(1);
}

static uint64_t mix(uint64_t x)
{
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
	x = (x ^ x >> 27) * 0x94d049bb133111ebu;
	return x ^ x >> 31;
}

static uint64_t word(uint32_t pattern, size_t k)
{
	return pattern ? mix(pattern + (k & ~7UL)) : 0;
}

static void on_fault(int sig, siginfo_t *info, void *context)
{
	(void)context;
	fprintf(stderr, "crowd: signal %d at %p while %s\n", sig, info->si_addr, doing);
	_exit(1);
}

static void verify(struct slot *s, const char *when)
{
	for (uint32_t i = 0; i < s->n; i++) {
		const uint64_t *w = (const uint64_t *)(s->p + i * PAGE);

		for (size_t k = 0; k < WORDS; k += 37)
			if (w[k] != word(s->holds[i], k)) {
				fprintf(stderr, "crowd: page %u of %p: word %zu is %#lx, not %#lx, %s\n", i,
					(void *)s->p, k, w[k], word(s->holds[i], k), when);
				_exit(1);
			}
	}
}

static void fill(struct slot *s, uint32_t i, uint32_t pattern)
{
	uint64_t *w = (uint64_t *)(s->p + i * PAGE);

	for (size_t k = 0; k < WORDS; k++)
		w[k] = word(pattern, k);
	s->holds[i] = pattern;
}

static void fill_all(struct slot *s, uint64_t rnd)
{
	for (uint32_t i = 0; i < s->n; i++)
		fill(s, i, rnd >> i & 1 ? 1 + (uint32_t)(rnd >> 8) % PATTERNS : (uint32_t)mix(rnd + i) | 64);
}

/* `n` pages, and one in front that nobody may touch. */
static unsigned char *map(uint32_t n)
{
	unsigned char *p = mmap(NULL, (n + 1) * PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED || mprotect(p, PAGE, PROT_NONE))
		die("map");
	return p + PAGE;
}

static void renew(struct slot *s, uint64_t rnd)
{
	if (s->p && s->block)
		free(s->p);
	else if (s->p && munmap(s->p - PAGE, (s->n + 1) * PAGE))
		die("munmap");
	s->block = rnd % 16 == 0;
	s->n = s->block ? BLOCK_PAGES : 1 + (uint32_t)(rnd >> 8) % PAGES_MAX;
	s->p = s->block ? memset(aligned_alloc(PAGE, s->n * PAGE), 0, s->n * PAGE) : map(s->n);
	memset(s->holds, 0, sizeof(s->holds));
	verify(s, "fresh");
	fill_all(s, rnd >> 16);
}

static void move(struct slot *s)
{
	unsigned char *to = map(s->n);

	if (mremap(s->p, s->n * PAGE, s->n * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
		die("mremap");
	if (munmap(s->p - PAGE, PAGE)) /* the guard that stayed */
		die("munmap of a guard");
	s->p = to;
}

/* Shorter, or longer at another place: behind it may be the guard of a neighbour. */
static void resize(struct slot *s, uint64_t rnd)
{
	uint32_t n = 1 + (uint32_t)rnd % PAGES_MAX;
	unsigned char *to;

	if (n < s->n && munmap(s->p + n * PAGE, (s->n - n) * PAGE))
		die("munmap of a tail");
	if (n > s->n) {
		to = map(n);
		if (mremap(s->p, s->n * PAGE, n * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to) {
			if (munmap(s->p - PAGE, PAGE))
				die("munmap of a guard");
			s->p = to;
		} else if (errno == EFAULT && !munmap(to - PAGE, (n + 1) * PAGE)) {
			return; /* a part is mergeable, and a part is not: that is two mappings */
		} else {
			die("mremap to more");
		}
	}
	for (uint32_t i = s->n; i < n; i++)
		s->holds[i] = 0;
	s->n = n;
}

static void child(size_t me, uint64_t rnd)
{
	alarm(60);
	for (size_t i = me; i < nr_slots; i += THREADS * 16) {
		verify(&slots[i], "in a forked child");
		fill_all(&slots[i], mix(rnd + i));
	}
	for (size_t i = me; i < nr_slots; i += THREADS * 64)
		renew(&slots[i], mix(rnd + i));
	for (size_t i = me; i < nr_slots; i += THREADS * 16)
		verify(&slots[i], "written by a forked child");
	_exit(0);
}

static void fork_once(size_t me, uint64_t rnd)
{
	pid_t pid = fork();
	int status;

	if (pid < 0)
		die("fork");
	if (!pid)
		child(me, rnd);
	if (waitpid(pid, &status, 0) != pid || status) {
		fprintf(stderr, "crowd: a child ended with status %#x\n", status);
		_exit(1);
	}
}

static void operate(struct slot *s, enum op op, uint64_t rnd, size_t me)
{
	uint32_t i = (uint32_t)(rnd >> 32) % s->n, n = 1 + (uint32_t)(rnd >> 40) % (s->n - i);

	doing = names[op];
	verify(s, "before");
	switch (op) {
	case WRITE:
		fill(s, i, rnd >> 8 & 1 ? 1 + (uint32_t)(rnd >> 9) % PATTERNS : (uint32_t)rnd | 64);
		break;
	case GUARD:
		if (mprotect(s->p + i * PAGE, n * PAGE, PROT_READ))
			die("mprotect");
		verify(s, "read-only");
		if (rnd & 1 && mprotect(s->p + i * PAGE, n * PAGE, PROT_NONE))
			die("mprotect to nothing");
		if (mprotect(s->p + i * PAGE, n * PAGE, RW))
			die("mprotect back");
		break;
	case DISCARD:
		if (madvise(s->p + i * PAGE, n * PAGE, MADV_DONTNEED))
			die("MADV_DONTNEED");
		memset(s->holds + i, 0, n * sizeof(*s->holds));
		break;
	case MOVE:
		if (!s->block)
			move(s);
		break;
	case RESIZE:
		if (!s->block)
			resize(s, rnd);
		break;
	case OVER:
		if (s->block)
			break;
		if (mmap(s->p + i * PAGE, n * PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
			die("mmap over");
		memset(s->holds + i, 0, n * sizeof(*s->holds));
		break;
	case ADVISE:
		if (madvise(s->p, s->n * PAGE, rnd & 1 ? MADV_UNMERGEABLE : MADV_MERGEABLE))
			die("MADV_UNMERGEABLE");
		break;
	case FORK:
		fork_once(me, rnd);
		break;
	default:
		renew(s, op == BLOCK ? rnd & ~15UL : rnd);
	}
	verify(s, doing);
	done[me][op]++;
}

static void *work(void *arg)
{
	size_t me = (size_t)arg % THREADS;
	uint64_t state = mix((uint64_t)arg);
	time_t forked = time(NULL);

	while (!stop) {
		uint64_t rnd = mix(state += 0x9e3779b97f4a7c15u);
		size_t i = (mix(rnd) % (nr_slots / THREADS)) * THREADS + me;
		enum op op = (enum op)(rnd % FORK);

		if (me == 0 && forked != time(NULL)) {
			forked = time(NULL);
			op = FORK;
		}
		operate(&slots[i], op, mix(rnd + 1), me);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_t threads[THREADS];
	struct timespec second = {.tv_sec = 1};
	uint64_t seed;

	if (argc < 3)
		return 2;
	sigaction(SIGSEGV, &(struct sigaction){.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO}, NULL);
	sigaction(SIGBUS, &(struct sigaction){.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO}, NULL);
	nr_slots = strtoul(argv[2], NULL, 0) / THREADS * THREADS;
	seed = argc > 3 ? strtoul(argv[3], NULL, 0) : (uint64_t)time(NULL);
	if (prctl(67 /* PR_SET_MEMORY_MERGE */, 1UL, 0UL, 0UL, 0UL))
		die("PR_SET_MEMORY_MERGE");
	slots = calloc(nr_slots, sizeof(*slots));
	for (size_t i = 0; i < nr_slots; i++)
		renew(&slots[i], mix(seed + i));
	for (size_t t = 0; t < THREADS; t++)
		pthread_create(&threads[t], NULL, work, (void *)(seed * THREADS + t));
	for (long t = strtol(argv[1], NULL, 10); t > 0; t--)
		nanosleep(&second, NULL);
	stop = 1;
	for (size_t t = 0; t < THREADS; t++)
		pthread_join(threads[t], NULL);
	for (size_t i = 0; i < nr_slots; i++)
		verify(&slots[i], "at the end");
	for (int op = 0; op < NR_OPS; op++) {
		for (size_t t = 1; t < THREADS; t++)
			done[0][op] += done[t][op];
		printf("%s %lu%s", names[op], done[0][op], op + 1 < NR_OPS ? ", " : "\n");
	}
	return 0;
}
