/* SPDX-License-Identifier: Apache-2.0 */
/* Whether cmpxchg16b exchanges exactly if both halves are as expected. */
#include <stdbool.h>
#include <stdint.h>

struct pair {
	uint64_t low, high;
} __attribute__((aligned(16)));

static bool exchange(struct pair *p, struct pair from, struct pair to)
{
	bool done;

	__asm__ volatile("lock cmpxchg16b %1\n\tsetz %0"
			 : "=q"(done), "+m"(*p), "+a"(from.low), "+d"(from.high)
			 : "b"(to.low), "c"(to.high)
			 : "cc", "memory");
	return done;
}

int main(void)
{
	for (uint64_t i = 0; i < 64; i++) {
		struct pair p = {1UL << i, ~(1UL << i)}, low = p, high = p;
		const struct pair other = {3, 4};

		low.low ^= 1UL << (63 - i);
		high.high ^= 1UL << (63 - i);
		if (exchange(&p, low, other) || exchange(&p, high, other) || p.low != 1UL << i)
			return 1;
		if (!exchange(&p, p, other) || p.low != 3 || p.high != 4)
			return 2;
	}
	return 0;
}
