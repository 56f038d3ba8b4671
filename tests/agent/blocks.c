/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Allocates, resizes and frees blocks of sizes around SAMEPAGE_MIN_ALLOC with every function of the malloc family, in
 * several threads, while another thread forks. Checks every byte of the blocks.
 *
 * Usage: blocks MIN_ALLOC ROUNDS SEED. Exit status 0, or 1 after saying what was wrong.
 */
#define _GNU_SOURCE
#include "../check.h"

#include <errno.h>
#include <malloc.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define THREADS 4
#define SLOTS 12

static size_t min_alloc;
static long rounds;
static bool enabled; /* large blocks are expected to start on a page boundary */

struct slot {
	unsigned char *p;
	size_t size;
	unsigned tag;
};

static uint64_t next(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	return *state ^= *state << 17;
}

/* Small blocks, blocks within a page of the bound, and large ones. */
static size_t some_size(uint64_t *state)
{
	switch (next(state) % 4) {
	case 0:
		return next(state) % 5000 + 1;
	case 1:
		return min_alloc - 4096 + next(state) % 8192;
	case 2:
		return min_alloc + next(state) % (4 * min_alloc);
	default:
		return next(state) % min_alloc + 1;
	}
}

/* The first and last bytes of every page are enough to tell blocks and pages apart. */
static void write_all(const struct slot *s)
{
	for (size_t i = 0; i < s->size; i += 4096)
		s->p[i] = (unsigned char)(s->tag + i / 4096);
	s->p[s->size - 1] = (unsigned char)s->tag;
}

static void check_all(const struct slot *s, size_t size)
{
	for (size_t i = 0; i < size; i += 4096)
		CHECK(s->p[i] == (unsigned char)(s->tag + i / 4096) ||
		      (i == s->size - 1 && s->p[i] == (unsigned char)s->tag));
	if (size == s->size)
		CHECK(s->p[s->size - 1] == (unsigned char)s->tag);
}

static void check_placed(const void *p, size_t size, size_t align)
{
	CHECK(p && (uintptr_t)p % align == 0);
	CHECK(malloc_usable_size((void *)p) >= size);
	if (enabled && size >= min_alloc)
		CHECK((uintptr_t)p % 4096 == 0);
}

static void allocate(struct slot *s, uint64_t *state)
{
	size_t size = some_size(state), align = 16;
	void *p = NULL;

	switch (next(state) % 8) {
	case 0:
	case 1:
		p = malloc(size);
		break;
	case 2:
		p = calloc(size / 3 + 1, 3);
		for (size_t i = 0; i < size; i += 512)
			CHECK(((unsigned char *)p)[i] == 0);
		break;
	case 3:
		align = 8UL << next(state) % 15; /* 8 bytes to 128 KiB */
		CHECK(!posix_memalign(&p, align, size));
		break;
	case 4:
		align = 16UL << next(state) % 19; /* to 4 MiB */
		p = aligned_alloc(align, (size + align - 1) / align * align);
		break;
	case 5:
		align = 4096;
		p = next(state) % 2 ? valloc(size) : pvalloc(size);
		break;
	case 6:
		align = 64;
		p = memalign(align, size);
		break;
	case 7:
		p = reallocarray(NULL, size, 1);
		break;
	}
	check_placed(p, size, align);
	*s = (struct slot){p, size, (unsigned)next(state)};
	write_all(s);
}

static void resize(struct slot *s, uint64_t *state)
{
	size_t size = some_size(state), usable = malloc_usable_size(s->p);
	unsigned char *p;

	s->p[usable - 1] ^= 0; /* what is said to be usable can be used */
	p = realloc(s->p, size);
	check_placed(p, size, 16);
	s->p = p;
	check_all(s, size < s->size ? size : s->size);
	s->size = size;
	write_all(s);
}

static void *churn(void *arg)
{
	uint64_t state = (uint64_t)(uintptr_t)arg;
	struct slot slots[SLOTS] = {0};

	for (long i = 0; i < rounds; i++) {
		struct slot *s = &slots[next(&state) % SLOTS];

		if (!s->p) {
			allocate(s, &state);
			continue;
		}
		check_all(s, s->size);
		if (next(&state) % 2) {
			resize(s, &state);
		} else {
			errno = 4711;
			free(s->p);
			CHECK(errno == 4711);
			s->p = NULL;
		}
	}
	for (int i = 0; i < SLOTS; i++)
		free(slots[i].p);
	return NULL;
}

static void edges(void)
{
	volatile size_t huge = SIZE_MAX; /* the compiler would warn */
	void *p = NULL;

	errno = 0;
	CHECK(!malloc(huge) && errno == ENOMEM);
	CHECK(!malloc(huge / 2 - 100));
	CHECK(!calloc(huge, 2));
	CHECK(!calloc(huge / 2, 4));
	CHECK(!reallocarray(NULL, huge, 3));
	CHECK(!pvalloc(huge - 5));
	CHECK(posix_memalign(&p, 3, 2 * min_alloc) == EINVAL);
	CHECK(posix_memalign(&p, 4, 2 * min_alloc) == EINVAL);
	CHECK(posix_memalign(&p, 64, huge / 2) == ENOMEM);
	CHECK(!aligned_alloc(huge / 2 + 1, min_alloc));
	CHECK(malloc_usable_size(NULL) == 0);
	free(NULL);
	p = malloc(3 * min_alloc);
	memset(p, 7, 3 * min_alloc);
	CHECK(!realloc(p, huge / 2)); /* and is still there */
	for (size_t i = 0; i < 3 * min_alloc; i++)
		CHECK(((char *)p)[i] == 7);
	CHECK(!realloc(p, 0));
	/* What malloc gave may be unmapped by whoever believes to know better; it is then nobody's. */
	if (enabled) {
		p = malloc(2 * min_alloc);
		CHECK(!munmap(p, 2 * min_alloc));
		CHECK(mmap(p, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == p);
		CHECK(!munmap(p, 4096));
	}
}

/* Memory of the real allocator that the program advised goes back to it like any other. */
static void advised(void)
{
	size_t size = min_alloc / 2;
	char *p;

	for (int i = 0; i < 20; i++) {
		CHECK(!posix_memalign((void **)&p, 4096, size));
		memset(p, i + 1, size);
		CHECK(!madvise(p, size / 4096 * 4096, MADV_MERGEABLE));
		usleep(2000);
		p = realloc(p, i % 2 ? size + 100 : size / 2);
		for (size_t j = 0; j < size / 2; j++)
			CHECK(p[j] == i + 1);
		free(p);
		p = calloc(1, size);
		for (size_t j = 0; j < size; j++)
			CHECK(p[j] == 0);
		free(p);
	}
}

int main(int argc, char **argv)
{
	pthread_t threads[THREADS];
	uint64_t seed;

	if (argc != 4)
		return 2;
	min_alloc = strtoul(argv[1], NULL, 0);
	rounds = strtol(argv[2], NULL, 0);
	seed = strtoul(argv[3], NULL, 0) * 1000 + 1;
	enabled = getenv("SAMEPAGE_SOCKET");
	edges();
	advised();
	for (uintptr_t i = 0; i < THREADS; i++)
		CHECK(!pthread_create(&threads[i], NULL, churn, (void *)(uintptr_t)(seed + i)));
	for (int i = 0; i < 20; i++) {
		pid_t pid = fork();
		int status;

		CHECK(pid >= 0);
		if (!pid) {
			rounds = rounds / 50 + 1;
			churn((void *)(uintptr_t)(seed + 100 + (uint64_t)i));
			_exit(0);
		}
		CHECK(waitpid(pid, &status, 0) == pid);
		CHECK(status == 0);
	}
	for (int i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	return 0;
}
