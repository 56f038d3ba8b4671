/* SPDX-License-Identifier: Apache-2.0 */
/* What the agent gives up before the application is refused memory, because it counts against the application's
 * limits. */
#include "base/maps.h"
#include "hooks/hooks.h"
#include "kernel/window.h"
#include "pages/pages.h"
#include "thread/peer.h"

bool relieve_mappings(void)
{
	int err = errno;
	bool joined = false;

	if (segment_dev && thread_is_here())
		agent_call(rejoin, &joined);
	errno = err;
	return joined;
}

bool relieve(size_t bytes)
{
	int err = errno;
	sigset_t saved;
	bool any, joined = relieve_mappings();

	mmap_lock(&saved);
	any = blocks_release();
	mmap_unlock(&saved);
	/* The windows count, too. Merged memory stays merged. */
	if (thread_is_here() && windows_matter(bytes)) {
		agent_retire();
		any = true;
	}
	errno = err;
	return any || joined;
}
