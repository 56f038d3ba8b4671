/* SPDX-License-Identifier: Apache-2.0 */
/* Keeps 32 MiB of pages that are equal in pairs for a while. The only calls that it makes itself are open, read, write
 * and mmap. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PAGES 8192

int main(void)
{
	char *memory = malloc((size_t)PAGES << 12);
	struct timespec now, begun;
	long sum = 0;

	if (!memory)
		return 1;
	for (long i = 0; i < PAGES; i++)
		memset(memory + (i << 12), (int)(i % 64) + 1, 4096);
	clock_gettime(CLOCK_MONOTONIC, &begun);
	do
		clock_gettime(CLOCK_MONOTONIC, &now);
	while (now.tv_sec - begun.tv_sec < 2);
	for (long i = 0; i < PAGES; i++)
		sum += memory[(i << 12) + 17];
	printf("%ld\n", sum);
	return 7;
}
