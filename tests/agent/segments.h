/* SPDX-License-Identifier: Apache-2.0 */
/* For programs that look at their own mappings. */
#ifndef TESTS_AGENT_SEGMENTS_H
#define TESTS_AGENT_SEGMENTS_H

#include <stdint.h>
#include <stdio.h>
#include <string.h>

/* Bytes of the range that are mapped from segments. */
static unsigned long from_segments(uintptr_t from, uintptr_t to)
{
	unsigned long start, end, sum = 0;
	FILE *maps = fopen("/proc/self/maps", "re");
	char line[512];

	while (fgets(line, sizeof(line), maps)) {
		if (sscanf(line, "%lx-%lx", &start, &end) != 2 || !strstr(line, "memfd:samepage"))
			continue;
		start = start > from ? start : from;
		end = end < to ? end : to;
		sum += start < end ? end - start : 0;
	}
	fclose(maps);
	return sum;
}

#endif
