/* SPDX-License-Identifier: Apache-2.0 */
/*
 * 256 blocks of 100,000 bytes in malloc's heap, the same in every copy of this program, but argv[1] bytes further up: so they lie
 * at other offsets within their pages. With argv[2] they are those of a thread, in an arena. Says "ready", and waits.
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define BLOCKS 256
#define BYTES 100000UL

static void *fill(void *junk)
{
	uint64_t x = 88172645463325252ULL;

	for (int i = 0; i < BLOCKS; i++) {
		uint64_t *block;

		if (!malloc((size_t)junk))
			exit(1);
		block = malloc(BYTES);
		for (size_t word = 0; word < BYTES / sizeof(*block); word++) {
			x ^= x << 13; /* xorshift64 (Marsaglia, 2003) */
			x ^= x >> 7;
			x ^= x << 17;
			block[word] = x;
		}
	}
	puts("ready");
	fflush(stdout);
	pause();
	return NULL;
}

int main(int argc, char **argv)
{
	void *junk = (void *)strtoul(argv[1], NULL, 0);
	pthread_t thread;

	if (argc == 2)
		return fill(junk) != NULL;
	if (pthread_create(&thread, NULL, fill, junk))
		return 1;
	pthread_join(thread, NULL);
	return 0;
}
