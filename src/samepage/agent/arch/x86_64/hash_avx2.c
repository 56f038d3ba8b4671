/* SPDX-License-Identifier: Apache-2.0 */
/* XXH3 for CPUs with AVX2: the same result as with narrower vectors, a third faster. See hash.c. */
#pragma GCC target("avx2")
#define XXH_VECTOR 2 /* XXH_AVX2 */
#define XXH_INLINE_ALL
#include <xxhash.h>

uint64_t hash_avx2(const void *data, size_t len);

uint64_t hash_avx2(const void *data, size_t len)
{
	return XXH3_64bits(data, len);
}
