/* SPDX-License-Identifier: Apache-2.0 */
/* Has 20 MiB of memory, and becomes the program that its arguments name when a line comes on stdin. */
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	char *memory = mmap(NULL, 20 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char byte = 0;

	memset(memory, argc, 20 << 20);
	while (byte != '\n' && read(0, &byte, 1) == 1) /* not more: the rest is for who comes after */
		;
	if (byte == '\n')
		execv(argv[1], argv + 1);
	return 1;
}
