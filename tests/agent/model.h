/* SPDX-License-Identifier: Apache-2.0 */
/* How a program that compares the agent's books with a model of its own reports a difference. */
#ifndef SAMEPAGE_TESTS_MODEL_H
#define SAMEPAGE_TESTS_MODEL_H

#include <stdio.h>
#include <stdlib.h>

static unsigned long operation; /* the number of the random one that is being done */

#define CHECK(what)                                                                                                    \
	do {                                                                                                           \
		if (!(what)) {                                                                                         \
			printf("operation %lu, line %d: not %s\n", operation, __LINE__, #what);                        \
			exit(1);                                                                                       \
		}                                                                                                      \
	} while (0)

#endif
