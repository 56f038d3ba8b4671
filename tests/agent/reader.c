/*
 * Reads all memory of another process again and again, the agent's windows too: ./reader PID ROUNDS
 *
 * It uses /proc/PID/mem and process_vm_readv in turn, and does not check what it reads. It is there for the effect of
 * reading: reading a page that is absent maps the zero page.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <unistd.h>

#define PAGE 4096UL
#define LARGE (64UL << 20)

int main(int argc, char **argv)
{
	static char page[PAGE];
	unsigned long done = 0;
	char path[64], line[512];
	int mem;

	if (argc != 3)
		return 2;
	snprintf(path, sizeof(path), "/proc/%s/mem", argv[1]);
	mem = open(path, O_RDONLY);
	if (mem < 0)
		return 1;
	snprintf(path, sizeof(path), "/proc/%s/maps", argv[1]);
	for (int round = 0; round < atoi(argv[2]); round++) {
		FILE *maps = fopen(path, "r");
		unsigned long start, end;

		if (!maps)
			break;
		while (fgets(line, sizeof(line), maps)) {
			if (sscanf(line, "%lx-%lx", &start, &end) != 2 || end - start > LARGE)
				continue;
			for (; start < end; start += PAGE) {
				struct iovec here = {page, PAGE}, there = {(void *)start, PAGE};
				ssize_t got = (start / PAGE + (unsigned long)round) % 2
						      ? pread(mem, page, PAGE, (off_t)start)
						      : process_vm_readv(atoi(argv[1]), &here, 1, &there, 1, 0);

				done += got == (ssize_t)PAGE;
			}
		}
		fclose(maps);
	}
	printf("%lu\n", done);
	return 0;
}
