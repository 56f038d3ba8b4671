/* SPDX-License-Identifier: Apache-2.0 */
/* Pages and addresses, and what every file of the agent begins with. Nothing here changes, so no lock is needed. */
#ifndef SAMEPAGE_BASE_PAGE_H
#define SAMEPAGE_BASE_PAGE_H

#include "arch/arch.h"

#define PAGE_SHIFT ARCH_PAGE_SHIFT
#define PAGE_SIZE (1UL << PAGE_SHIFT)
#define PAGE_SIZE_MAX (1UL << ARCH_PAGE_SHIFT_MAX)
#define PAGE_ALIGN_DOWN(x) ((uintptr_t)(x) & ~(PAGE_SIZE - 1))
#define PAGE_ALIGN_UP(x) PAGE_ALIGN_DOWN((uintptr_t)(x) + PAGE_SIZE - 1)
#define SECTION_MAX 512UL /* pages swapped under one hold of the lock: one PMD's worth if pages are 4 KiB */
/* The planes cover addresses below this. User addresses are, unless a program asks for higher ones by hint. */
#define ADDRESS_END ARCH_ADDRESS_END

extern const uint8_t zero_page[PAGE_SIZE_MAX];

static inline uintptr_t min_addr(uintptr_t a, uintptr_t b)
{
	return a < b ? a : b;
}

#endif
