/* SPDX-License-Identifier: Apache-2.0 */
/* The checksum of a page: XXH3, by the widest vectors that the CPU has. */
#include "base/settings.h"
#include "pages/pages.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

uint64_t page_hash_avx2(const void *page); /* hash_avx2.c */

static uint64_t page_hash(const void *page)
{
	return XXH3_64bits(page, PAGE_SIZE);
}

uint64_t page_checksum(const void *page)
{
	static uint64_t (*hash)(const void *page);
	uint64_t sum;

	if (!hash)
		hash = __builtin_cpu_supports("avx2") ? page_hash_avx2 : page_hash;
	sum = hash(page);
	return settings.flags & SP_WELCOME_TRUNCATE_HASH ? sum & 0xff : sum;
}
