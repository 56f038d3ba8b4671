/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How long the agent waits for its lock while application threads want it all the time, on one CPU.
 *
 *   lock_model THREADS
 *
 * Prints how many milliseconds it took to take it ten times. Each thread holds the lock for two milliseconds at a time.
 */
#define _GNU_SOURCE
#include "base/area.h"
#include "base/check.h"
#include "base/descriptors.h"
#include "base/lock.h"
#include "base/real.h"
#include "base/system.h"

#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

struct real real = {.syscall = syscall};

void area_trim(void)
{
}

bool descriptors_are_ours(void)
{
	return true;
}

bool on_agent_thread(void)
{
	return false;
}

static void *want(void *arg)
{
	(void)arg;
	for (;;) {
		sigset_t saved;
		int64_t until;

		mmap_lock(&saved);
		until = now_ms() + 2;
		while (now_ms() < until)
			;
		mmap_unlock(&saved);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	int threads = argc > 1 ? atoi(argv[1]) : 4;
	cpu_set_t one;
	int64_t began;

	CPU_ZERO(&one);
	CPU_SET(sched_getcpu(), &one);
	sched_setaffinity(0, sizeof(one), &one);
	for (int i = 0; i < threads; i++) {
		pthread_t thread;

		if (pthread_create(&thread, NULL, want, NULL))
			return 2;
	}
	usleep(100000);
	began = now_ms();
	for (int i = 0; i < 10; i++) {
		agent_mmap_lock();
		agent_mmap_unlock();
	}
	printf("%ld\n", (long)(now_ms() - began));
	fflush(stdout);
	_exit(0);
}
