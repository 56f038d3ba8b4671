/* SPDX-License-Identifier: Apache-2.0 */
/* Uses the widest vectors that the CPU has. All x86-64 processors have SSE2. */
#include "arch/arch.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

uint64_t hash_avx2(const void *data, size_t len); /* hash_avx2.c */

static uint64_t hash_sse2(const void *data, size_t len)
{
	return XXH3_64bits(data, len);
}

uint64_t (*arch_hash(void))(const void *data, size_t len)
{
	return __builtin_cpu_supports("avx2") ? hash_avx2 : hash_sse2;
}
