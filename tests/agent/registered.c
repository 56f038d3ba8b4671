/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A program with a large buffer of zeros that a device fills later.
 *
 * registered FILE
 *
 * Prints where its memory is: BYTES that are a registered buffer of an io_uring, and as many that are not. At the next
 * line on stdin the io_uring reads FILE, which the program has filled, into the buffer. Then the program prints how
 * many words of the buffer differ from the file, and how many of the rest are not zero.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define BYTES (64UL << 20)
#define PIECE (1UL << 20)

static struct io_uring_params params;
static struct io_uring_sqe *sqes;
static char *sq, *cq;
static int ring;

static void die(const char *what)
{
	perror(what);
	exit(2);
}

static void *map_ring(size_t len, off_t offset)
{
	void *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, ring, offset);

	if (p == MAP_FAILED)
		die("mmap of the ring");
	return p;
}

static void set_up(void *buffer)
{
	struct iovec iov = {buffer, BYTES};

	ring = (int)syscall(SYS_io_uring_setup, 4, &params);
	if (ring < 0)
		die("io_uring_setup");
	sq = map_ring(params.sq_off.array + params.sq_entries * 4, IORING_OFF_SQ_RING);
	cq = map_ring(params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe), IORING_OFF_CQ_RING);
	sqes = map_ring(params.sq_entries * sizeof(*sqes), IORING_OFF_SQES);
	if (syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &iov, 1))
		die("io_uring_register");
}

static void read_fixed(int file, char *to, size_t offset)
{
	_Atomic unsigned *tail = (_Atomic unsigned *)(sq + params.sq_off.tail);
	_Atomic unsigned *head = (_Atomic unsigned *)(cq + params.cq_off.head);
	unsigned at = *tail & *(unsigned *)(sq + params.sq_off.ring_mask);
	struct io_uring_cqe *done = (struct io_uring_cqe *)(cq + params.cq_off.cqes) +
				    (*head & *(unsigned *)(cq + params.cq_off.ring_mask));

	sqes[at] = (struct io_uring_sqe){
		.opcode = IORING_OP_READ_FIXED, .fd = file, .addr = (uintptr_t)to, .len = PIECE, .off = offset};
	((unsigned *)(sq + params.sq_off.array))[at] = at;
	atomic_fetch_add(tail, 1);
	if (syscall(SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) != 1)
		die("io_uring_enter");
	if (done->res != (int)PIECE) {
		errno = -done->res;
		die("READ_FIXED");
	}
	atomic_fetch_add(head, 1);
}

int main(int argc, char **argv)
{
	uint64_t *mem = mmap(NULL, 2 * BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int file = argc > 1 ? open(argv[1], O_RDWR | O_CREAT | O_CLOEXEC, 0600) : -1;
	static uint64_t piece[PIECE / 8];
	unsigned long wrong = 0;

	if (mem == MAP_FAILED || file < 0)
		die("start");
	memset(mem, 0, 2 * BYTES);
	madvise(mem, 2 * BYTES, MADV_MERGEABLE);
	set_up(mem);
	printf("%lu\n", (unsigned long)mem);
	fflush(stdout);
	if (getchar() == EOF)
		return 0;
	for (size_t at = 0; at < BYTES; at += PIECE) {
		for (size_t i = 0; i < PIECE / 8; i++)
			piece[i] = at + 8 * i + 1;
		if (pwrite(file, piece, PIECE, (off_t)at) != (ssize_t)PIECE)
			die("pwrite");
		read_fixed(file, (char *)mem + at, at);
	}
	for (size_t i = 0; i < 2 * BYTES / 8; i++)
		wrong += mem[i] != (i < BYTES / 8 ? 8 * i + 1 : 0);
	printf("%lu\n", wrong);
	return 0;
}
