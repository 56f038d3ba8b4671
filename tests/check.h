/* SPDX-License-Identifier: Apache-2.0 */
/* For programs that check themselves: what is not as it must be is said on stderr, and the program ends with status 1. */
#ifndef TESTS_CHECK_H
#define TESTS_CHECK_H

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define CHECK(what)                                                                                                    \
	do {                                                                                                           \
		if (!(what)) {                                                                                         \
			fprintf(stderr, "%s:%d: not %s (errno %d, %s)\n", __func__, __LINE__, #what, errno,            \
				strerror(errno));                                                                      \
			_exit(1);                                                                                      \
		}                                                                                                      \
	} while (0)

#endif
