/* SPDX-License-Identifier: Apache-2.0 */
/* Making merged pages zeros, as discarded memory is. */
#include "base/area.h"
#include "base/planes.h"
#include "base/settings.h"
#include "kernel/headroom.h"
#include "pages/pages.h"

#include <string.h>
#include <sys/mman.h>

int zero_segments(uintptr_t start, uintptr_t end)
{
	uint64_t last = end >> PAGE_SHIFT, stop;

	if (!discard_segments(start, end))
		return 0;
	/* There is no mapping to be had (vm.max_map_count). Write zeros instead; that takes memory. */
	for (uint64_t vpn = start >> PAGE_SHIFT; (vpn = page_next(PAGE_SEGMENT, vpn, last, true)) < last; vpn = stop) {
		const struct area *a = area_next(vpn << PAGE_SHIFT);
		size_t bytes;

		stop = min_addr(page_next(PAGE_SEGMENT, vpn, last, false), a ? a->end >> PAGE_SHIFT : 0);
		bytes = (stop - vpn) << PAGE_SHIFT;
		if (stop <= vpn || !(a->prot & PROT_WRITE) || headroom(settings.use_swap) < bytes + settings.reserve)
			return -EAGAIN;
		memset((void *)(vpn << PAGE_SHIFT), 0, bytes);
		page_set(PAGE_ISLAND, vpn, stop, true);
	}
	return 0;
}
