/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A thread that writes to pages at random and measures how long each write takes: what merging costs who meets it. It
 * writes what is there already, so that a page stays equal to others and goes on being merged.
 */
#include <stdint.h>
#include <time.h>

#define PAGE_SIZE 4096
#define BUCKETS 20000 /* of 1 us; the last has what took longer too */

struct writer {
	volatile int stop, recording;
	volatile uint64_t longest_ns;
	uint32_t histogram[BUCKETS];
};

/* A realtime thread that never sleeps is stopped for 50 ms in each second (the fair class's deadline server, Linux 6.12;
 * sched_rt_runtime_us before). So it sleeps of its own accord, between two touches and longer than that. */
#define NAP_EVERY 500000000ULL
#define NAP 60000000ULL

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

/* Until `stop`: a touch every `gap_ns`, of which those while `recording` are counted. */
void writer_run(volatile uint8_t *memory, uint64_t npages, uint64_t gap_ns, struct writer *w)
{
	uint64_t random = 88172645463325252, due = now(), nap = due + NAP_EVERY;

	while (!w->stop) {
		volatile uint8_t *p;
		uint64_t start, took;

		random ^= random << 13; /* xorshift64, Marsaglia 2003 */
		random ^= random >> 7;
		random ^= random << 17;
		p = memory + random % npages * PAGE_SIZE;
		if (due > nap) {
			nanosleep(&(struct timespec){.tv_nsec = NAP}, NULL);
			due = now();
			nap = due + NAP_EVERY;
		}
		while ((start = now()) < due)
			;
		*p = *p;
		took = now() - start;
		due = start + gap_ns;
		if (!w->recording)
			continue;
		w->histogram[took / 1000 < BUCKETS ? took / 1000 : BUCKETS - 1]++;
		if (took > w->longest_ns)
			w->longest_ns = took;
	}
}
