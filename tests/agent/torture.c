/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A program that knows nothing of samepage and checks every byte of its memory while it is merged.
 *
 * torture SECONDS DIRECTORY [SEED [huge] [unnamed]]
 *
 * Eight threads share a few regions. Page i of a region belongs to thread i % 8, so that neighbours in one extent are
 * written by different threads. The shadow copy says what each page must hold: one of a few patterns (so that pages are
 * equal, in runs and scattered) or zeros, with at most one word changed. Threads fill, poke, read(2) into, O_DIRECT
 * read(2) into, discard and verify their own pages. Whole regions are remapped, grown, shrunk, split by a partial
 * unmap, protected, freed and allocated anew, and made huge pages; and the program forks children, which verify and
 * write them.
 *
 * With `huge`, regions are made huge pages again most of the time. With `unnamed`, it asks for nothing to be merged.
 *
 * Prints how much of each was done. Exit status 0, or 1 after the first byte that is wrong.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define WORDS (PAGE / 8)
#ifndef THREADS
#define THREADS 8
#endif
#ifndef REGIONS
#define REGIONS 12
#endif
#define REGION_PAGES 512UL /* 2 MiB */
#define PATTERNS 24

struct shadow {
	uint32_t pattern; /* 0: zeros */
	uint32_t poke;	  /* word that differs, or WORDS: none */
	uint64_t value;
};

struct region {
	pthread_rwlock_t lock; /* read: work on one's own pages; write: work on the whole */
	char *mem;
	int heap; /* from malloc, else mmap + MADV_MERGEABLE */
	int huge; /* made of huge pages a moment ago, from which nothing is discarded yet */
	struct shadow page[REGION_PAGES];
};

static struct region regions[REGIONS];
static int file, direct; /* the patterns, page by page: page cache and O_DIRECT */
static _Atomic int stop;
static _Atomic int children;
static int mostly_huge, unnamed;

enum op { FILL, POKE, READ, DIRECT, DISCARD, FREE, VERIFY, REMAP, RESIZE, UNMAP, PROTECT, RENEW, RUNS, FORK, NR_OPS };
static const char *const names[] = {"fill",  "poke",   "read",	"direct",  "discard", "free",  "verify",
				    "remap", "resize", "unmap", "protect", "renew",   "runs", "fork"};
static _Atomic unsigned long done[NR_OPS];

static uint64_t mix(uint64_t x)
{
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
	return x ^ (x >> 31);
}

static uint64_t word_of(uint32_t pattern, size_t i)
{
	return pattern ? mix(pattern * 1000003u + i) : 0;
}

static void fail(const char *what, const struct region *r, size_t page, size_t word, uint64_t got, uint64_t want)
{
	fprintf(stderr, "torture: %s: region %ld (%p) page %zu word %zu holds %#lx, not %#lx (pid %d)\n", what,
		(long)(r - regions), (void *)r->mem, page, word, got, want, getpid());
	_exit(1);
}

static _Thread_local const char *doing = "start";

/* A page that cannot be touched is as wrong as a byte: say where it is and what stands there. */
static void on_fault(int sig, siginfo_t *info, void *context)
{
	static char buf[1 << 20];
	int maps = open("/proc/self/maps", O_RDONLY);
	uintptr_t at = (uintptr_t)info->si_addr, start, end;
	ssize_t have = 0, got;

	(void)context;
	fprintf(stderr, "torture: signal %d code %d at %p during %s (pid %d)\n", sig, info->si_code, info->si_addr, doing,
		getpid());
	while (maps >= 0 && have < (ssize_t)sizeof(buf) - 1 && (got = read(maps, buf + have, sizeof(buf) - 1 - (size_t)have)) > 0)
		have += got;
	for (char *line = strtok(buf, "\n"); line; line = strtok(NULL, "\n"))
		if (sscanf(line, "%lx-%lx", &start, &end) == 2 && start < at + (1 << 22) && end + (1 << 22) > at)
			fprintf(stderr, "torture: %s\n", line);
	for (size_t i = 0; i < REGIONS; i++)
		fprintf(stderr, "torture: region %zu at %p\n", i, (void *)regions[i].mem);
	_exit(1);
}

static void die(const char *what)
{
	perror(what);
	_exit(2);
}

static char *page_of(const struct region *r, size_t i)
{
	return r->mem + i * PAGE;
}

static void verify_page(const struct region *r, size_t i, const char *what)
{
	const volatile uint64_t *w = (uint64_t *)page_of(r, i);
	const struct shadow *s = &r->page[i];

	for (size_t k = 0; k < WORDS; k++) {
		uint64_t want = k == s->poke ? s->value : word_of(s->pattern, k), got = w[k];

		if (got != want)
			fail(what, r, i, k, got, want);
	}
}

static void verify_region(const struct region *r, const char *what)
{
	for (size_t i = 0; i < REGION_PAGES; i++)
		verify_page(r, i, what);
}

static void fill_page(struct region *r, size_t i, uint32_t pattern)
{
	uint64_t *w = (uint64_t *)page_of(r, i);

	for (size_t k = 0; k < WORDS; k++)
		w[k] = word_of(pattern, k);
	r->page[i] = (struct shadow){pattern, WORDS, 0};
}

static void forget(struct region *r, size_t i)
{
	r->page[i] = (struct shadow){0, WORDS, 0};
}

static void name(struct region *r)
{
	if (!unnamed)
		madvise(r->mem, REGION_PAGES * PAGE, MADV_MERGEABLE);
}

static void new_memory(struct region *r)
{
	if (r->heap) {
		r->mem = calloc(REGION_PAGES, PAGE);
		if (!r->mem || (uintptr_t)r->mem % PAGE) /* without the preload calloc gives no whole pages: take mmap */
			r->heap = 0;
	}
	if (!r->heap) {
		r->mem = mmap(NULL, REGION_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (r->mem == MAP_FAILED)
			die("mmap");
		name(r);
	}
	for (size_t i = 0; i < REGION_PAGES; i++)
		forget(r, i);
}

static void drop_memory(struct region *r)
{
	if (r->heap)
		free(r->mem);
	else if (munmap(r->mem, REGION_PAGES * PAGE))
		die("munmap");
}

static void page_op(struct region *r, size_t i, uint64_t rnd)
{
	uint32_t pattern = 1 + (uint32_t)(rnd >> 8) % PATTERNS;
	size_t k = (rnd >> 16) % WORDS;
	enum op op;

	switch (r->huge && (rnd % 16 == 9 || rnd % 16 == 10) ? 11 : rnd % 16) {
	case 0 ... 2:
		op = FILL;
		fill_page(r, i, pattern);
		break;
	case 3 ... 6:
		op = POKE;
		if (r->page[i].poke != WORDS) /* at most one word differs */
			k = r->page[i].poke;
		r->page[i].poke = (uint32_t)k;
		r->page[i].value = rnd >> 20 & 1 ? word_of(r->page[i].pattern, k) : rnd;
		((uint64_t *)page_of(r, i))[k] = r->page[i].value;
		break;
	case 7:
		op = READ;
		if (pread(file, page_of(r, i), PAGE, (off_t)(pattern * PAGE)) != (ssize_t)PAGE)
			die("pread");
		r->page[i] = (struct shadow){pattern, WORDS, 0};
		break;
	case 8:
		op = DIRECT;
		if (pread(direct, page_of(r, i), PAGE, (off_t)(pattern * PAGE)) != (ssize_t)PAGE)
			die("O_DIRECT pread");
		r->page[i] = (struct shadow){pattern, WORDS, 0};
		break;
	case 9:
		op = DISCARD;
		if (madvise(page_of(r, i), PAGE, MADV_DONTNEED))
			die("MADV_DONTNEED");
		forget(r, i);
		break;
	case 10:
		op = FREE; /* lazily: zeros or what was there, until it is written */
		if (madvise(page_of(r, i), PAGE, MADV_FREE))
			die("MADV_FREE");
		fill_page(r, i, pattern);
		break;
	default:
		op = VERIFY;
		break;
	}
	doing = names[op];
	verify_page(r, i, names[op]);
	done[op]++;
}

static void remap(struct region *r, size_t pages_then)
{
	char *p = mremap(r->mem, REGION_PAGES * PAGE, pages_then * PAGE, MREMAP_MAYMOVE);

	if (p == MAP_FAILED && errno == EFAULT) /* by now several mappings: not for mremap, with samepage or without */
		return;
	if (p == MAP_FAILED)
		die("mremap");
	r->mem = p;
	if (pages_then == REGION_PAGES)
		return;
	for (size_t i = REGION_PAGES; i < pages_then; i++)
		for (size_t k = 0; k < WORDS; k += 64)
			if (((uint64_t *)page_of(r, i))[k])
				fail("grown part", r, i, k, ((uint64_t *)page_of(r, i))[k], 0);
	if (pages_then > REGION_PAGES) {
		if (munmap(r->mem + REGION_PAGES * PAGE, (pages_then - REGION_PAGES) * PAGE))
			die("munmap of the grown part");
		return;
	}
	p = mremap(r->mem, pages_then * PAGE, REGION_PAGES * PAGE, MREMAP_MAYMOVE);
	if (p == MAP_FAILED && errno == EFAULT) {
		p = mmap(NULL, REGION_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (p == MAP_FAILED || munmap(memcpy(p, r->mem, pages_then * PAGE) == p ? r->mem : p, pages_then * PAGE))
			die("a new mapping");
	}
	if (p == MAP_FAILED)
		die("mremap back");
	r->mem = p;
	for (size_t i = pages_then; i < REGION_PAGES; i++)
		forget(r, i);
}

/* Moves the region to a reserved place, so that it must move. */
static void move_elsewhere(struct region *r)
{
	char *to = mmap(NULL, REGION_PAGES * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (to == MAP_FAILED)
		die("mmap target");
	if (mremap(r->mem, REGION_PAGES * PAGE, REGION_PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to) {
		r->mem = to;
		return;
	}
	if (errno != EFAULT)
		die("mremap to a fixed place");
	munmap(to, REGION_PAGES * PAGE);
}

static void in_child(struct region *r, uint64_t rnd)
{
	verify_region(r, "in a forked child");
	for (size_t i = 0; i < REGION_PAGES; i += 1 + rnd % 7)
		fill_page(r, i, 1 + (uint32_t)(rnd + i) % PATTERNS);
	if (rnd >> 40 & 1) { /* live long enough to be merged as a process of its own */
		struct timespec nap = {.tv_nsec = 300000000};

		nanosleep(&nap, NULL);
	}
	verify_region(r, "written by a forked child");
	_exit(0);
}

static void reap(int options)
{
	int status;
	pid_t pid;

	while ((pid = waitpid(-1, &status, options)) > 0) {
		children--;
		if (!WIFEXITED(status) || WEXITSTATUS(status)) {
			fprintf(stderr, "torture: child %d ended with status %#x\n", pid, status);
			_exit(1);
		}
	}
}

static void region_op(struct region *r, uint64_t rnd)
{
	size_t cut = 1 + (rnd >> 8) % (REGION_PAGES - 1);
	pid_t pid;
	enum op op;

	r->huge = 0;
	if (mostly_huge && rnd >> 50 & 3)
		rnd = (rnd & ~7UL) | 5 | 1UL << 31;
	switch (rnd % 8) {
	case 0:
		op = REMAP;
		if (!r->heap)
			move_elsewhere(r);
		break;
	case 1:
		op = RESIZE;
		if (!r->heap)
			remap(r, rnd >> 30 & 1 ? REGION_PAGES + cut : cut);
		break;
	case 2:
		op = UNMAP;
		if (r->heap)
			break;
		/* At once: another thread's mmap could take the place. */
		if (mmap(page_of(r, cut / 2), (cut + 1) / 2 * PAGE, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
			die("mmap over a part");
		if (rnd >> 30 & 1)
			name(r);
		for (size_t i = cut / 2; i < cut / 2 + (cut + 1) / 2; i++)
			forget(r, i);
		break;
	case 3:
		op = PROTECT;
		if (mprotect(r->mem, cut * PAGE, PROT_READ))
			die("mprotect");
		verify_region(r, "read-only");
		if (mprotect(r->mem, cut * PAGE, PROT_NONE) || mprotect(r->mem, cut * PAGE, PROT_READ | PROT_WRITE))
			die("mprotect back");
		break;
	case 4:
		op = RENEW;
		drop_memory(r);
		r->heap = rnd >> 30 & 1;
		new_memory(r);
		break;
	case 5:
	case 6:
		op = RUNS; /* what other regions hold too, in long runs; and in a huge page, if there is one to be had */
		r->huge = rnd >> 31 & 1;
		if (r->huge && (madvise(r->mem, REGION_PAGES * PAGE, MADV_HUGEPAGE) ||
				madvise(r->mem, REGION_PAGES * PAGE, MADV_DONTNEED)))
			die("MADV_HUGEPAGE");
		for (size_t i = 0; i < REGION_PAGES; i++)
			fill_page(r, i, 1 + (uint32_t)(i / 2) % PATTERNS);
		break;
	default:
		op = FORK;
		if (children > 8)
			break;
		pid = fork();
		if (pid < 0)
			die("fork");
		if (!pid)
			in_child(r, rnd);
		children++;
		break;
	}
	doing = names[op];
	verify_region(r, names[op]);
	done[op]++;
}

static void *worker(void *arg)
{
	uint64_t me = (uint64_t)arg % THREADS, state = mix((uint64_t)arg);

	while (!stop) {
		struct region *r;

		state += 0x9e3779b97f4a7c15u;
		r = &regions[mix(state) % REGIONS];
		if (mix(state + 1) % (mostly_huge ? 16 : 128) == 0) {
			pthread_rwlock_wrlock(&r->lock);
			region_op(r, mix(state + 2));
			pthread_rwlock_unlock(&r->lock);
			reap(WNOHANG);
			continue;
		}
		pthread_rwlock_rdlock(&r->lock);
		for (int n = 0; n < 8; n++)
			page_op(r, mix(state + 3 + (uint64_t)n) % (REGION_PAGES / THREADS) * THREADS + me,
				mix(state + 100 + (uint64_t)n));
		pthread_rwlock_unlock(&r->lock);
		if (mix(state + 4) % 4 == 0) { /* pages must stand still for a while to be merged */
			struct timespec nap = {.tv_nsec = 3000000};

			nanosleep(&nap, NULL);
		}
	}
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_t threads[THREADS];
	static char buf[PAGE] __attribute__((aligned(4096)));
	struct timespec second = {.tv_sec = 1};
	char path[4096];
	uint64_t seed;

	if (argc < 3) {
		fprintf(stderr, "usage: torture SECONDS DIRECTORY [SEED [huge] [unnamed]]\n");
		return 2;
	}
	sigaction(SIGSEGV, &(struct sigaction){.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO}, NULL);
	sigaction(SIGBUS, &(struct sigaction){.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO}, NULL);
	seed = argc > 3 ? strtoull(argv[3], NULL, 0) : (uint64_t)time(NULL);
	printf("seed %lu\n", seed);
	fflush(stdout);
	snprintf(path, sizeof(path), "%s/torture.%d", argv[2], getpid());
	file = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	if (file < 0)
		die(path);
	for (uint32_t p = 0; p <= PATTERNS; p++) {
		for (size_t k = 0; k < WORDS; k++)
			((uint64_t *)buf)[k] = word_of(p, k);
		if (write(file, buf, PAGE) != (ssize_t)PAGE)
			die(path);
	}
	fsync(file);
	for (int i = 4; i < argc; i++) {
		mostly_huge |= !strcmp(argv[i], "huge");
		unnamed |= !strcmp(argv[i], "unnamed");
	}
	direct = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
	if (direct < 0) /* or a tmpfs before 6.6 */
		direct = file;
	unlink(path);
	for (size_t i = 0; i < REGIONS; i++) {
		pthread_rwlock_init(&regions[i].lock, NULL);
		regions[i].heap = i % 2;
		new_memory(&regions[i]);
		for (size_t k = 0; k < REGION_PAGES; k++)
			fill_page(&regions[i], k, 1 + (uint32_t)(k / 2) % PATTERNS);
	}
	for (uint64_t t = 0; t < THREADS; t++)
		pthread_create(&threads[t], NULL, worker, (void *)(seed * THREADS + t));
	for (long t = strtol(argv[1], NULL, 10); t > 0; t--)
		nanosleep(&second, NULL);
	stop = 1;
	for (int t = 0; t < THREADS; t++)
		pthread_join(threads[t], NULL);
	reap(0);
	for (size_t i = 0; i < REGIONS; i++)
		verify_region(&regions[i], "at the end");
	for (int i = 0; i < NR_OPS; i++)
		printf("%s %lu%s", names[i], done[i], i + 1 < NR_OPS ? ", " : "\n");
	return 0;
}
