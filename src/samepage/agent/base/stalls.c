/* SPDX-License-Identifier: Apache-2.0 */
/* How long the application's threads were held up. */
#include "base/stalls.h"

static struct sp_stalls stalls;

void stalls_note(unsigned threads, uint64_t ns)
{
	static const uint64_t most_us[SP_STALLS - 1] = SP_STALLS_US;
	unsigned i = 0;

	while (i < SP_STALLS - 1 && ns > most_us[i] * 1000)
		i++;
	stalls.count[i] += threads;
	stalls.ns += threads * ns;
}

void stalls_take(struct sp_stalls *to)
{
	*to = stalls;
	stalls_forget();
}

void stalls_forget(void)
{
	stalls = (struct sp_stalls){0};
}
