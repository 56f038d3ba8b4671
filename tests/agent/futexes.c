/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Calls by which the kernel writes or moves pages that are being merged with those of another such process, and does
 * not wait for one that is away: futex(2) on a word of each page, and UFFDIO_MOVE of the pages. Says how many failed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define PAGES 8192UL
#define SECONDS 1
#define ROUNDS 3

/* struct uffdio_move (Linux 6.8). */
struct move {
	uint64_t dst, src, len, mode;
	int64_t move;
};
#define MOVE _IOWR(UFFDIO, 0x05, struct move)

static char *block;

static int *word(unsigned long i)
{
	return (int *)(block + i * PAGE);
}

static int pi(unsigned long i)
{
	return syscall(SYS_futex, word(i), FUTEX_LOCK_PI_PRIVATE, 0, NULL, NULL, 0) ||
	       syscall(SYS_futex, word(i), FUTEX_UNLOCK_PI_PRIVATE, 0, NULL, NULL, 0);
}

static int wake_op(unsigned long i)
{
	static int nobody;

	return syscall(SYS_futex, &nobody, FUTEX_WAKE_OP_PRIVATE, 1, 1L, word(i),
		       FUTEX_OP(FUTEX_OP_ADD, 0, FUTEX_OP_CMP_EQ, 0)) < 0;
}

static int futexes(int (*call)(unsigned long))
{
	time_t end = time(NULL) + SECONDS + 1;
	int failed = 0;

	for (int n = 0; time(NULL) < end; n++) {
		failed += call((unsigned long)rand() % PAGES);
		if (n % 200 == 0)
			usleep(200);
	}
	return failed;
}

static char *map(void)
{
	return mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

/* -1: there is no UFFDIO_MOVE for us. */
static int moves(void)
{
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC), failed = 0;
	struct uffdio_api api = {.api = UFFD_API};
	char *to = map();
	struct uffdio_register reg = {.range = {(uintptr_t)to, PAGES * PAGE}, .mode = UFFDIO_REGISTER_MODE_MISSING};

	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &reg))
		return -1;
	sleep(SECONDS);
	for (unsigned long i = 0; i < PAGES; i += 64) {
		struct move m = {(uintptr_t)to + i * PAGE, (uintptr_t)block + i * PAGE, 64 * PAGE, 0, 0};

		failed += ioctl(uffd, MOVE, &m) || *(unsigned long *)(to + i * PAGE + 64) != i + 1;
	}
	munmap(to, PAGES * PAGE);
	close(uffd);
	return failed;
}

int main(int argc, char **argv)
{
	const char *how = argc > 1 ? argv[1] : "pi";
	int failed = 0;

	for (int round = 0; round < ROUNDS; round++) {
		block = map();
		for (unsigned long i = 0; i < PAGES; i++) {
			*word(i) = 0;
			*(unsigned long *)(block + i * PAGE + 64) = i + 1;
		}
		failed += !strcmp(how, "moves") ? moves() : futexes(!strcmp(how, "pi") ? pi : wake_op);
		munmap(block, PAGES * PAGE);
	}
	printf("failed: %d\n", failed);
	return 0;
}
