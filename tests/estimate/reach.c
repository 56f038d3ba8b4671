/* SPDX-License-Identifier: Apache-2.0 */
/* 4 MiB of each kind of memory that `samepage run` takes or leaves alone. Says "ready", and waits to be killed. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define BYTES (4UL << 20)

static char data[BYTES] = {1};

/* Of 1,000 bytes each, which are the arena's that the thread allocates from. */
static void small_blocks(void)
{
	for (size_t done = 0; done < BYTES; done += 1000)
		memset(malloc(1000), 's', 1000);
}

static void *thread(void *arg)
{
	char stack[BYTES];

	small_blocks();
	memset(stack, 't', sizeof(stack));
	__asm__ volatile("" : : "r"(stack) : "memory");
	write(1, "ready\n", 6);
	pause();
	return arg;
}

int main(void)
{
	char *mapped = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	pthread_t t;

	memset(mapped, 'm', BYTES);
	memset(malloc(BYTES), 'l', BYTES);
	for (size_t done = 0; done < BYTES; done += 200 << 10)
		memset(malloc(200 << 10), 'b', 200 << 10);
	small_blocks();
	memset(data, 'd', BYTES);
	if (pthread_create(&t, NULL, thread, NULL))
		return 1;
	pthread_join(t, NULL);
	return 0;
}
