/* SPDX-License-Identifier: Apache-2.0 */
/* NUMA nodes: where pages are, and where new ones go. */
#include "base/real.h"
#include "base/settings.h"
#include "kernel/kernel.h"

#include <fcntl.h>
#include <linux/mempolicy.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define NODES_MAX 1024

bool several_nodes(void)
{
	int file = open("/sys/devices/system/node/online", O_RDONLY | O_CLOEXEC);
	char buf[64] = "";
	ssize_t got = file < 0 ? 0 : read(file, buf, sizeof(buf) - 1);

	if (file >= 0)
		close(file);
	return got > 0 && (memchr(buf, '-', (size_t)got) || memchr(buf, ',', (size_t)got));
}

int page_nodes(uintptr_t start, size_t n, int *node)
{
	void *page[SECTION_MAX];

	for (size_t i = 0; i < n; i++) {
		page[i] = (void *)(start + i * PAGE_SIZE);
		node[i] = settings.flags & SP_WELCOME_TWO_NODES ? (int)((start >> PAGE_SHIFT) + i) & 1 : 0;
	}
	/* move_pages(2) without target nodes moves nothing and says where the pages are. */
	if (kernel.numa && real.syscall(SYS_move_pages, 0, n, page, NULL, node, 0))
		return -errno;
	return 0;
}

void prefer_node(int node)
{
	static unsigned long before[NODES_MAX / 64], mask[NODES_MAX / 64];
	static int mode = -1;

	if (!kernel.numa || node >= NODES_MAX)
		return;
	if (mode < 0 && real.syscall(SYS_get_mempolicy, &mode, before, (unsigned long)NODES_MAX, NULL, 0))
		return;
	memset(mask, 0, sizeof(mask));
	if (node >= 0)
		mask[node / 64] = 1UL << node % 64;
	real.syscall(SYS_set_mempolicy, node < 0 ? mode : MPOL_PREFERRED, node < 0 ? before : mask,
		     (unsigned long)NODES_MAX);
}
