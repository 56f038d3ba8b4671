/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A program whose memory devices write to.
 *
 * pinned FILE SLOW_FILE
 *
 * Prints where its area of PAGES pages is. Then does what it reads, one command a line, and answers each with a line:
 *
 *   write    writes every page, as it must be from then on
 *   pin      registers the pages from PINNED on as a buffer of an io_uring
 *   device   has the io_uring read FILE into them
 *   unpin    lets go of them
 *   read     starts a thread that reads SLOW_FILE into the pages from PINNED on
 *   join     waits for it
 *   check    the number of words that are wrong
 *   child    whether there is a child to wait for
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096UL
#define PAGES 512UL
#define PINNED 200UL
#define LENGTH 16UL

static uint64_t *mem;
static uint64_t *pinned;
static int file, slow;
static int ring = -1;
static pthread_t reader;
static uint64_t version, device_version;

static void die(const char *what)
{
	perror(what);
	exit(2);
}

static uint64_t word(size_t page, uint64_t v)
{
	return page << 32 | v;
}

/* One READ_FIXED of the whole buffer, and its end. */
static void read_by_ring(void)
{
	struct io_uring_params p = {0};
	static struct io_uring_sqe *sqes;
	static char *sq, *cq;
	static struct io_uring_params params;

	if (ring < 0) {
		ring = (int)syscall(SYS_io_uring_setup, 4, &p);
		if (ring < 0)
			die("io_uring_setup");
		params = p;
		sq = mmap(NULL, p.sq_off.array + p.sq_entries * 4, PROT_READ | PROT_WRITE, MAP_SHARED, ring,
			  IORING_OFF_SQ_RING);
		cq = mmap(NULL, p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe), PROT_READ | PROT_WRITE,
			  MAP_SHARED, ring, IORING_OFF_CQ_RING);
		sqes = mmap(NULL, p.sq_entries * sizeof(*sqes), PROT_READ | PROT_WRITE, MAP_SHARED, ring,
			    IORING_OFF_SQES);
		if (sq == MAP_FAILED || cq == MAP_FAILED || sqes == MAP_FAILED)
			die("mmap of the ring");
		return;
	}
	unsigned *tail = (unsigned *)(sq + params.sq_off.tail),
		 at = *tail & *(unsigned *)(sq + params.sq_off.ring_mask);
	unsigned *head = (unsigned *)(cq + params.cq_off.head);
	struct io_uring_cqe *done = (struct io_uring_cqe *)(cq + params.cq_off.cqes) +
				    (*head & *(unsigned *)(cq + params.cq_off.ring_mask));

	sqes[at] = (struct io_uring_sqe){
		.opcode = IORING_OP_READ_FIXED, .fd = file, .addr = (uintptr_t)pinned, .len = LENGTH * PAGE};
	((unsigned *)(sq + params.sq_off.array))[at] = at;
	atomic_store((_Atomic unsigned *)tail, *tail + 1);
	if (syscall(SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) != 1)
		die("io_uring_enter");
	if (done->res != (int)(LENGTH * PAGE)) {
		errno = -done->res;
		die("READ_FIXED");
	}
	atomic_store((_Atomic unsigned *)head, *head + 1);
}

/* Fills FILE with what the pinned pages are to hold next. */
static void prepare(int fd)
{
	static uint64_t page[PAGE / 8];

	device_version = ++version;
	for (size_t i = PINNED; i < PINNED + LENGTH; i++) {
		for (size_t k = 0; k < PAGE / 8; k++)
			page[k] = word(i, device_version);
		if (pwrite(fd, page, PAGE, (off_t)((i - PINNED) * PAGE)) != (ssize_t)PAGE)
			die("pwrite");
	}
}

static void *read_slowly(void *arg)
{
	(void)arg;
	if (pread(slow, pinned, LENGTH * PAGE, 0) != (ssize_t)(LENGTH * PAGE))
		die("pread");
	return NULL;
}

static void do_what(const char *what)
{
	struct iovec buffer = {pinned, LENGTH * PAGE};
	static uint64_t written;
	long answer = 0;

	if (!strcmp(what, "write")) {
		written = device_version = ++version;
		for (size_t i = 0; i < PAGES * PAGE / 8; i++)
			mem[i] = word(i / (PAGE / 8), version);
	} else if (!strcmp(what, "pin")) {
		if (ring < 0)
			read_by_ring();
		answer = syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &buffer, 1) ? errno : 0;
	} else if (!strcmp(what, "device")) {
		prepare(file);
		read_by_ring();
	} else if (!strcmp(what, "unpin")) {
		answer = syscall(SYS_io_uring_register, ring, IORING_UNREGISTER_BUFFERS, NULL, 0);
	} else if (!strcmp(what, "read")) {
		prepare(slow);
		pthread_create(&reader, NULL, read_slowly, NULL);
	} else if (!strcmp(what, "join")) {
		pthread_join(reader, NULL);
	} else if (!strcmp(what, "check")) {
		for (size_t i = 0; i < PAGES * PAGE / 8; i++) {
			size_t page = i / (PAGE / 8);

			answer += mem[i] !=
				  word(page, page >= PINNED && page < PINNED + LENGTH ? device_version : written);
		}
	} else if (!strcmp(what, "child")) {
		answer = waitpid(-1, NULL, WNOHANG | __WALL) < 0 && errno == ECHILD ? 0 : 1;
	}
	printf("%ld\n", answer);
}

int main(int argc, char **argv)
{
	char line[64];

	if (argc < 3)
		return 2;
	setvbuf(stdout, NULL, _IOLBF, 0);
	file = open(argv[1], O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	slow = open(argv[2], O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	if (file < 0 || slow < 0)
		die("open");
	mem = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (mem == MAP_FAILED)
		die("mmap");
	madvise(mem, PAGES * PAGE, MADV_NOHUGEPAGE);
	madvise(mem, PAGES * PAGE, MADV_MERGEABLE);
	pinned = mem + PINNED * (PAGE / 8);
	printf("%lu\n", (unsigned long)mem);
	while (fgets(line, sizeof(line), stdin)) {
		line[strcspn(line, "\n")] = 0;
		do_what(line);
	}
	return 0;
}
