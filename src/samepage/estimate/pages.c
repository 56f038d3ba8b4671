/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a scan does a quarter of a million times for each GiB: read a page, hash it, and ask the kernel what kind of
 * page it is. Called through ctypes, which releases the GIL, so that every core can work.
 *
 * It reads memory of processes only through /proc/PID/mem. process_vm_readv(2) pins what it reads (FOLL_PIN), and since
 * Linux 5.19 pinning a page that is shared copy-on-write first gives the process a copy of its own (gup_must_unshare):
 * it would undo the very sharing that the scan looks for.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#define EXPORT __attribute__((visibility("default")))
#define PAGE_SIZE 4096UL
#define READ_PAGES 64UL /* pages read by one system call; the buffer stays in the L2 cache */
#define SPAN 512UL	/* entries of /proc/kpageflags read by one system call */

enum { PAGE_READ = 1, PAGE_CHUNK = 2 };

struct run {
	uint64_t offset; /* bytes into the file */
	uint64_t npages;
};

/*
 * Whether this looks like the first page of a large block of glibc's malloc: a mapping of its own, which starts with an
 * unused word and the length, a multiple of the page size, with only the bit IS_MMAPPED set (malloc/malloc.c).
 */
static int is_mmapped_chunk(const uint64_t *page)
{
	return page[0] == 0 && (page[1] & (PAGE_SIZE - 1)) == 2 && page[1] > PAGE_SIZE && page[1] >> 47 == 0;
}

static uint64_t hash_run(int fd, const struct run *run, unsigned char *buffer, uint64_t *sums, uint8_t *states)
{
	uint64_t done = 0, nread = 0;

	while (done < run->npages) {
		uint64_t want = run->npages - done < READ_PAGES ? run->npages - done : READ_PAGES;
		ssize_t got = pread(fd, buffer, want * PAGE_SIZE, (off_t)(run->offset + done * PAGE_SIZE));
		uint64_t whole = got > 0 ? (uint64_t)got / PAGE_SIZE : 0;

		for (uint64_t i = 0; i < whole; i++) {
			const unsigned char *page = buffer + i * PAGE_SIZE;

			sums[done + i] = XXH3_64bits(page, PAGE_SIZE);
			states[done + i] = PAGE_READ | (is_mmapped_chunk((const uint64_t *)page) ? PAGE_CHUNK : 0);
		}
		nread += whole;
		done += whole;
		if (whole < want && done < run->npages) { /* this page is gone, or was never there */
			sums[done] = 0;
			states[done++] = 0;
		}
	}
	return nread;
}

/*
 * Hashes the pages of `nruns` runs of `fd`, in order. Each page gets its XXH3 in `sums` and PAGE_READ with further
 * flags in `states` (0: it could not be read). Returns the number of pages read; -1: no memory for a buffer.
 */
EXPORT int64_t samepage_scan_hash(int fd, const struct run *runs, uint64_t nruns, uint64_t *sums, uint8_t *states)
{
	unsigned char *buffer = aligned_alloc(PAGE_SIZE, READ_PAGES * PAGE_SIZE);
	uint64_t nread = 0;

	if (!buffer)
		return -1;
	for (uint64_t i = 0; i < nruns; i++) {
		nread += hash_run(fd, &runs[i], buffer, sums, states);
		sums += runs[i].npages;
		states += runs[i].npages;
	}
	free(buffer);
	return (int64_t)nread;
}

/*
 * Reads entries of /proc/kpageflags or /proc/kpagecount (`fd`) for `n` page frame numbers, in any order, most of which
 * are neighbours. An entry that cannot be read becomes 0.
 */
EXPORT void samepage_scan_frames(int fd, const uint64_t *pfns, uint64_t n, uint64_t *out)
{
	uint64_t span[SPAN];

	for (uint64_t i = 0, j; i < n; i = j) {
		uint64_t low = pfns[i], high = pfns[i];

		/* Reading an entry costs a fifth of a system call. So read across gaps, but no more entries of gaps
		 * than wanted ones. */
		for (j = i + 1; j < n; j++) {
			uint64_t l = pfns[j] < low ? pfns[j] : low, h = pfns[j] > high ? pfns[j] : high;

			if (h - l >= SPAN || h - l > 2 * (j - i) + 4)
				break;
			low = l;
			high = h;
		}
		memset(span, 0, (high - low + 1) * sizeof(*span));
		if (pread(fd, span, (high - low + 1) * sizeof(*span), (off_t)(low * sizeof(*span))) < 0)
			memset(span, 0, (high - low + 1) * sizeof(*span));
		for (uint64_t k = i; k < j; k++)
			out[k] = span[pfns[k] - low];
	}
}
