/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Has PAGES pages, every other of which is merged. Then maps as many pieces as it is told, while threads look at the
 * pages and write to some. Prints what the test asserts.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGES 40000UL
#define PAGE 4096UL
#define THREADS 3

static unsigned char *area;
static _Atomic uint32_t wrong, stop;
static uint32_t written[THREADS][PAGES];

static uint32_t *word(size_t page, size_t at)
{
	return (uint32_t *)(area + page * PAGE) + at;
}

/* Each thread has a word of its own in every page. It writes to those that are not merged, and to a merged one now and then. */
static void *look(void *arg)
{
	size_t me = (size_t)arg;
	unsigned seed = (unsigned)me + 1;

	for (uint32_t n = 1; !stop; n++) {
		size_t page = (size_t)rand_r(&seed) % PAGES;

		if (*word(page, 0) != page + 1 || *word(page, 1000) != ~(uint32_t)page ||
		    *word(page, 10 + me) != written[me][page])
			wrong++;
		if (page % 2 == 0 || n % 5000 == 0)
			*word(page, 10 + me) = written[me][page] = n;
	}
	for (size_t page = 0; page < PAGES; page++)
		if (*word(page, 0) != page + 1 || *word(page, 1000) != ~(uint32_t)page ||
		    *word(page, 10 + me) != written[me][page])
			wrong++;
	return NULL;
}

/* One way or the other to have one mapping more. */
static int cut(unsigned char *reserved, unsigned long piece)
{
	unsigned char *at = reserved + 2 * piece * PAGE;

	switch (piece % 4) {
	case 0:
		return mprotect(at, PAGE, PROT_READ | PROT_WRITE);
	case 1:
		return madvise(at, PAGE, MADV_DONTDUMP);
	case 2:
		return munmap(at, PAGE);
	default:
		return mmap(at, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED;
	}
}

int main(void)
{
	unsigned char *reserved;
	pthread_t thread[THREADS];
	unsigned long pieces, got;
	int err;

	area = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	madvise(area, PAGES * PAGE, MADV_NOHUGEPAGE);
	for (size_t page = 0; page < PAGES; page++) {
		*word(page, 0) = (uint32_t)page + 1;
		*word(page, 1000) = ~(uint32_t)page;
	}
	madvise(area, PAGES * PAGE, MADV_MERGEABLE);
	printf("%lu\n", (unsigned long)area);
	fflush(stdout);
	while (scanf("%lu", &pieces) == 1) {
		stop = 0;
		for (size_t i = 0; i < THREADS; i++)
			pthread_create(&thread[i], NULL, look, (void *)i);
		reserved = mmap(NULL, 2 * pieces * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		for (got = 0; got < pieces && !cut(reserved, got); got++)
			;
		stop = 1;
		err = got < pieces ? errno : 0;
		for (size_t i = 0; i < THREADS; i++)
			pthread_join(thread[i], NULL);
		if (munmap(reserved, 2 * pieces * PAGE) && !err)
			err = errno;
		printf("pieces %lu %s, wrong %u\n", got, err ? strerror(err) : "", wrong);
		fflush(stdout);
	}
	return 0;
}
