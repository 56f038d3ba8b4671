/* SPDX-License-Identifier: Apache-2.0 */
/* A process of whose code one page never comes, since it serves that itself, by userfaultfd, and does not. */
#define _GNU_SOURCE
#include "../check.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#define BELOW_STACK (64UL << 20) /* above all other code but the kernel's, so it is read first */
#define LEN 4096UL

int main(void)
{
	struct uffdio_api api = {.api = UFFD_API};
	void *at = (void *)(((unsigned long)&api - BELOW_STACK) & -LEN);
	struct uffdio_register range = {.range = {(unsigned long)at, LEN}, .mode = UFFDIO_REGISTER_MODE_MISSING};
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC), file = memfd_create("code", 0);
	char byte;

	CHECK(uffd >= 0 && !ioctl(uffd, UFFDIO_API, &api) && !ftruncate(file, LEN));
	CHECK(mmap(at, LEN, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_SHARED | MAP_FIXED_NOREPLACE, file, 0) == at);
	CHECK(!ioctl(uffd, UFFDIO_REGISTER, &range));
	CHECK(write(1, "ready\n", 6) == 6);
	while (read(0, &byte, 1) > 0)
		;
	return 0;
}
