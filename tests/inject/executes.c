/* SPDX-License-Identifier: Apache-2.0 */
/* Executes itself again and again, from the thread that the first argument names, until a byte comes on stdin. The second
 * argument is how often it did. */
#define _GNU_SOURCE
#include "../check.h"

#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char **arguments;

static void *execute(void *unused)
{
	struct pollfd end = {0, POLLIN, 0};
	char times[32];

	CHECK(poll(&end, 1, 3) >= 0);
	if (end.revents) {
		printf("%s\n", arguments[2]);
		exit(0);
	}
	snprintf(times, sizeof(times), "%d", atoi(arguments[2]) + 1);
	execl("/proc/self/exe", arguments[0], arguments[1], times, NULL);
	CHECK(!"executed");
	return unused;
}

int main(int argc, char **argv)
{
	pthread_t thread;

	CHECK(argc == 3);
	arguments = argv;
	if (!strcmp(argv[2], "1"))
		puts("ready");
	fflush(stdout);
	if (!strcmp(argv[1], "first"))
		execute(NULL);
	CHECK(!pthread_create(&thread, NULL, execute, NULL));
	for (;;)
		poll(NULL, 0, 1);
}
