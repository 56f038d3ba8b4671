/* SPDX-License-Identifier: Apache-2.0 */
/* The agent's knowledge of limits (agent/kernel/headroom.c), applied to another process. */
#include "kernel/headroom.c"

#include <stdio.h>

struct sp_welcome settings; /* the agent's; its values don't matter here */

uint64_t headroom_of(pid_t pid, bool *unseen);

uint64_t headroom_of(pid_t pid, bool *unseen)
{
	char cgroup[64];
	/* The other paths are as this process sees them: with its own cgroup namespace and mounts. */
	struct roots files = kernel_files;
	uint64_t bytes;

	snprintf(cgroup, sizeof(cgroup), "/proc/%d/cgroup", pid);
	files.cgroup = files.thread_cgroup = cgroup;
	bytes = headroom_under(&files, false);
	*unseen = headroom_unknown();
	return bytes;
}
