/* SPDX-License-Identifier: Apache-2.0 */
/* What the agent knows of limits (agent/kernel/headroom.c), asked for another process. */
#include "kernel/headroom.c"

#include <stdio.h>

struct sp_welcome settings; /* the agent's: nothing in it matters here */

uint64_t headroom_of(pid_t pid, bool *unseen);

uint64_t headroom_of(pid_t pid, bool *unseen)
{
	char cgroup[64];
	/* All paths are as this process sees them: its cgroup namespace, its mounts. */
	struct roots files = kernel_files;
	uint64_t bytes;

	snprintf(cgroup, sizeof(cgroup), "/proc/%d/cgroup", pid);
	files.cgroup = files.thread_cgroup = cgroup;
	bytes = headroom_under(&files, false);
	*unseen = headroom_unknown();
	return bytes;
}
