/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The floor: two processes with the same memory that they merge with nothing but the work that merging as samepage does
 * it cannot do without, and without anybody who would have to find out what is equal. Each hashes its pages, writes
 * every other segment from them, and swaps all of its pages for those of the segments, section by section: moves them
 * away, compares, maps the segment's. There are no looks at what was written, no messages, no lock, no proof, no step
 * that nobody can stop, and no look at what a move really moved: so it is no way to merge memory.
 *
 *     floor MIB
 *
 * prints the seconds that took, and the CPU seconds of both processes, as JSON.
 */
#define _GNU_SOURCE
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define SECTION (64 * PAGE) /* what is away at once, as in WELCOME */
#define CHUNK (512 * PAGE)  /* what is registered at once */
#define SEGMENT (2048 * PAGE)
#define FAULT_AROUND (16 * PAGE)
#define SEGMENTS_MAX 4096
#define SEALS (F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

#define FEATURE_MOVE (1 << 16) /* 6.8 */
struct move {
	uint64_t dst, src, len, mode;
	int64_t moved;
};
#define UFFDIO_MOVE_IT _IOWR(UFFDIO, 0x05, struct move)

static struct shared {
	_Atomic int ready, go, sealed[SEGMENTS_MAX];
	double ended[2], cpu[2]; /* of each process */
} *shared;
static int segments[SEGMENTS_MAX];
static uint64_t sum; /* so that hashing is not left out */

static double seconds(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void must(int ok, const char *what)
{
	if (ok)
		return;
	perror(what);
	_exit(1);
}

static void wait_for(_Atomic int *what, int value)
{
	while (atomic_load(what) < value)
		usleep(50);
}

/* As the bench's own workers have it: pages equal to nothing but their like. */
static void fill(uint64_t *memory, size_t len)
{
	for (size_t i = 0; i < len / 8; i++)
		memory[i] = (i / (PAGE / 8)) * 0xD1342543DE82EF95 + (i % (PAGE / 8) + 1) * 0x9E3779B97F4A7C15;
}

static int open_uffd(void)
{
	struct uffdio_api api = {.api = UFFD_API, .features = FEATURE_MOVE};
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);

	must(uffd >= 0 && !ioctl(uffd, UFFDIO_API, &api), "userfaultfd");
	return uffd;
}

static void donate(char *memory, size_t len, int fd)
{
	for (size_t at = 0; at < len; at += CHUNK)
		must(write(fd, memory + at, CHUNK) == (ssize_t)CHUNK, "write");
	must(!fcntl(fd, F_ADD_SEALS, SEALS), "F_ADD_SEALS");
}

static void swap_section(int uffd, char *memory, char *scratch, char *view)
{
	struct move move = {(uintptr_t)scratch, (uintptr_t)memory, SECTION, 1 /* wake nobody */, 0};
	struct uffdio_range range = {(uintptr_t)memory, SECTION};

	must(!ioctl(uffd, UFFDIO_MOVE_IT, &move), "UFFDIO_MOVE");
	must(!memcmp(scratch, view, SECTION), "equal pages");
	must(mremap(view, SECTION, SECTION, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, memory) != MAP_FAILED,
	     "mremap");
	must(!ioctl(uffd, UFFDIO_WAKE, &range), "UFFDIO_WAKE");
}

static void merge(int uffd, char *memory, char *scratch, char *view, int fd)
{
	must(mmap(view, SEGMENT, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, fd, 0) == view, "mmap");
	for (size_t at = 0; at < SEGMENT; at += CHUNK) {
		struct uffdio_register r = {.range = {(uintptr_t)memory + at, CHUNK},
					    .mode = UFFDIO_REGISTER_MODE_MISSING};

		must(!ioctl(uffd, UFFDIO_REGISTER, &r), "UFFDIO_REGISTER");
		for (size_t k = at; k < at + CHUNK; k += FAULT_AROUND)
			*(volatile char *)(view + k);
		/* What is mapped in its place is not registered: when the last section is, nothing is. */
		for (size_t k = 0; k < CHUNK; k += SECTION)
			swap_section(uffd, memory + at + k, scratch + k, view + at + k);
		must(!madvise(scratch, CHUNK, MADV_DONTNEED), "MADV_DONTNEED");
	}
}

static void process(int me, size_t len)
{
	char *memory = mmap(NULL, len + CHUNK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *scratch = mmap(NULL, CHUNK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *view = mmap(NULL, SEGMENT, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct uffdio_register r = {.range = {(uintptr_t)scratch, CHUNK}, .mode = UFFDIO_REGISTER_MODE_WP};
	int uffd = open_uffd();
	double cpu;

	must(memory != MAP_FAILED && scratch != MAP_FAILED && view != MAP_FAILED, "mmap");
	memory = (char *)(((uintptr_t)memory + CHUNK - 1) & ~(CHUNK - 1));
	must(!madvise(memory, len, MADV_NOHUGEPAGE) && !madvise(scratch, CHUNK, MADV_NOHUGEPAGE), "MADV_NOHUGEPAGE");
	must(!ioctl(uffd, UFFDIO_REGISTER, &r), "UFFDIO_REGISTER");
	fill((uint64_t *)memory, len);
	atomic_fetch_add(&shared->ready, 1);
	wait_for(&shared->go, 1);
	cpu = seconds(CLOCK_PROCESS_CPUTIME_ID);
	for (size_t at = 0; at < len; at += PAGE)
		sum += XXH3_64bits(memory + at, PAGE);
	for (size_t i = 0; i < len / SEGMENT; i += 2) {
		size_t own = i + (size_t)me, other = i + !me;

		donate(memory + own * SEGMENT, SEGMENT, segments[own]);
		atomic_store(&shared->sealed[own], 1);
		merge(uffd, memory + own * SEGMENT, scratch, view, segments[own]);
		wait_for(&shared->sealed[other], 1);
		merge(uffd, memory + other * SEGMENT, scratch, view, segments[other]);
	}
	shared->ended[me] = seconds(CLOCK_MONOTONIC);
	shared->cpu[me] = seconds(CLOCK_PROCESS_CPUTIME_ID) - cpu;
	_exit(!sum);
}

int main(int argc, char **argv)
{
	size_t len = (argc > 1 ? strtoul(argv[1], NULL, 10) : 512) << 20;
	pid_t pids[2];
	double began, ended;
	int status;

	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	must(shared != MAP_FAILED && len && len % (2 * SEGMENT) == 0 && len / SEGMENT <= SEGMENTS_MAX, "a size");
	for (size_t i = 0; i < len / SEGMENT; i++) {
		segments[i] = memfd_create("floor", MFD_CLOEXEC | MFD_ALLOW_SEALING);
		must(segments[i] >= 0, "memfd_create");
	}
	for (int me = 0; me < 2; me++) {
		pids[me] = fork();
		must(pids[me] >= 0, "fork");
		if (!pids[me])
			process(me, len);
	}
	while (atomic_load(&shared->ready) < 2) { /* one that failed is never ready */
		must(!waitpid(-1, &status, WNOHANG), "a process");
		usleep(1000);
	}
	began = seconds(CLOCK_MONOTONIC);
	atomic_store(&shared->go, 1);
	for (int i = 0; i < 2; i++)
		if (wait(&status) < 0 || status) {
			kill(pids[0], SIGKILL);
			kill(pids[1], SIGKILL);
			return 1;
		}
	ended = shared->ended[0] > shared->ended[1] ? shared->ended[0] : shared->ended[1];
	printf("{\"seconds\": %f, \"cpu_seconds\": %f}\n", ended - began, shared->cpu[0] + shared->cpu[1]);
	return 0;
}
