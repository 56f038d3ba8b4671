/* SPDX-License-Identifier: Apache-2.0 */
/* A process of whose code one page never comes, since it serves that itself, by userfaultfd, and does not. */
#define _GNU_SOURCE
#include "../check.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#define AT ((void *)0x10000) /* below all other code, so it is read first */
#define LEN 4096

int main(void)
{
	struct uffdio_api api = {.api = UFFD_API};
	struct uffdio_register range = {.range = {(unsigned long)AT, LEN}, .mode = UFFDIO_REGISTER_MODE_MISSING};
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC), file = memfd_create("code", 0);
	char byte;

	CHECK(uffd >= 0 && !ioctl(uffd, UFFDIO_API, &api) && !ftruncate(file, LEN));
	CHECK(mmap(AT, LEN, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_SHARED | MAP_FIXED, file, 0) == AT);
	CHECK(!ioctl(uffd, UFFDIO_REGISTER, &range));
	CHECK(write(1, "ready\n", 6) == 6);
	while (read(0, &byte, 1) > 0)
		;
	return 0;
}
