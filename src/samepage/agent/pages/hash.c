/* SPDX-License-Identifier: Apache-2.0 */
/* The checksum of a page. */
#include "base/settings.h"
#include "pages/pages.h"

uint64_t page_checksum(const void *page)
{
	static uint64_t (*hash)(const void *data, size_t len);
	uint64_t sum;

	if (!hash)
		hash = arch_hash();
	sum = hash(page, PAGE_SIZE);
	return settings.flags & SP_WELCOME_TRUNCATE_HASH ? sum & 0xff : sum;
}
