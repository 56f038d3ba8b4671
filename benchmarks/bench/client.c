/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A client of a server: asks a question every so often, and measures how long the answer takes. The time counts from
 * when the question was due, so that questions which had to wait for a slow answer count as slow, too.
 */
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BUCKETS 20000 /* of 1 us; the last has what took longer too */
#define BEHIND_MAX 100000000ULL

struct recorder {
	volatile int stop, recording;
	volatile uint64_t longest_ns;
	uint32_t histogram[BUCKETS];
};

struct question {
	const char *format;   /* for snprintf, with the number of the key, twice */
	uint64_t answer_size; /* bytes */
	uint64_t every;	      /* how often it is asked: once in so many */
};

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static void sleep_until(uint64_t ns)
{
	const struct timespec t = {.tv_sec = (time_t)(ns / 1000000000), .tv_nsec = (long)(ns % 1000000000)};

	clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
}

/* 0, or -1 when the server does not answer so. */
static int ask(int fd, const struct question *q, unsigned key)
{
	char buf[4096];
	int len = snprintf(buf, sizeof(buf), q->format, key, key);

	if (write(fd, buf, (size_t)len) != len)
		return -1;
	for (uint64_t got = 0; got < q->answer_size;) {
		ssize_t n = recv(fd, buf, sizeof(buf), 0);

		if (n <= 0 || (!got && buf[0] == '-'))
			return -1;
		got += (uint64_t)n;
	}
	return 0;
}

/* Until `stop`: a question every `gap_ns`, of which those that were due while `recording` are counted. Returns 0, or -1
 * when an answer was wrong. */
int client_run(int fd, const struct question *questions, uint64_t nquestions, uint64_t nkeys, uint64_t gap_ns,
	       struct recorder *r)
{
	uint64_t random = 88172645463325252, due = now();

	prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);
	for (uint64_t asked = 0; !r->stop; asked++, due += gap_ns) {
		const struct question *q = questions;
		int recording = r->recording;
		uint64_t took = now();

		if (took < due)
			sleep_until(due);
		else if (took - due > BEHIND_MAX) /* the machine did something else altogether */
			due = took - BEHIND_MAX;
		random ^= random << 13; /* xorshift64, Marsaglia 2003 */
		random ^= random >> 7;
		random ^= random << 17;
		for (uint64_t i = 1; i < nquestions; i++)
			if (asked % questions[i].every == 0)
				q = &questions[i];
		if (ask(fd, q, (unsigned)(random % nkeys)))
			return -1;
		took = now() - due;
		if (!recording || !r->recording)
			continue;
		r->histogram[took / 1000 < BUCKETS ? took / 1000 : BUCKETS - 1]++;
		if (took > r->longest_ns)
			r->longest_ns = took;
	}
	return 0;
}
