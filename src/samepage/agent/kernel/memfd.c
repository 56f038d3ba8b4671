/* SPDX-License-Identifier: Apache-2.0 */
#include "base/real.h"
#include "kernel/kernel.h"

#include <sys/mman.h>
#include <sys/syscall.h>

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 8U /* 6.3 */
#endif

int new_memfd(void)
{
	const unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
	int fd = (int)real.syscall(SYS_memfd_create, "samepage", flags | MFD_NOEXEC_SEAL);

	if (fd < 0 && errno == EINVAL)
		fd = (int)real.syscall(SYS_memfd_create, "samepage", flags);
	return fd < 0 ? -errno : fd;
}
