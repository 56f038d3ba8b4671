/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Programs built with a sanitizer are left alone: the sanitizer's runtime is their allocator, keeps books of all
 * memory, and takes us for a part of the program. All that they need of us is that they can start.
 */
#include "hooks/hooks.h"

#include <fcntl.h>
#include <link.h>
#include <string.h>
#include <unistd.h>

/* Symbols that only the runtimes have, whether shared or linked into the program. Without a runtime the loader leaves
 * them NULL. */
extern char __asan_init[] __attribute__((weak));
extern char __tsan_init[] __attribute__((weak));
extern char __msan_init[] __attribute__((weak));
extern char __lsan_do_leak_check[] __attribute__((weak));

const char *sanitizer(void)
{
	return __asan_init	      ? "AddressSanitizer"
	       : __tsan_init	      ? "ThreadSanitizer"
	       : __msan_init	      ? "MemorySanitizer"
	       : __lsan_do_leak_check ? "LeakSanitizer"
				      : NULL;
}

void say_left_alone(const char *why, const char *whose)
{
	char line[256] = "samepage: a program", *end = line + strlen("samepage: ");
	int file = open("/proc/self/comm", O_RDONLY | O_CLOEXEC);
	ssize_t got = file < 0 ? 0 : read(file, end, 32);

	if (file >= 0)
		close(file);
	end = got > 1 ? end + got - 1 : line + strlen(line);
	end = stpcpy(stpcpy(stpcpy(end, why), whose), ", and is left alone\n");
	if (write(2, line, (size_t)(end - line)) < 0)
		return; /* nobody listens */
}

/* ---- who comes first ----------------------------------------------------------------------------------- */

struct visit {
	int (*visitor)(struct dl_phdr_info *info, size_t size, void *data);
	void *data;
};

extern const char __ehdr_start[] __attribute__((visibility("hidden")));

static int visit_others(struct dl_phdr_info *info, size_t size, void *data)
{
	const struct visit *v = data;

	return info->dlpi_addr == (uintptr_t)__ehdr_start ? 0 : v->visitor(info, size, v->data);
}

/*
 * AddressSanitizer refuses to start if its runtime is not the first library after the program, since a library before
 * it may be an allocator. It asks by this call, before any constructor has run. Nothing of ours is an allocator in such
 * a process, so we hide from it. Other programs do see us: they may need this call to unwind stacks.
 */
SP_EXPORT int dl_iterate_phdr(int (*visitor)(struct dl_phdr_info *, size_t, void *), void *data)
{
	static int (*real_iterate)(int (*)(struct dl_phdr_info *, size_t, void *),
				   void *); /* every thread that sets it sets the same value */
	struct visit visit = {visitor, data};

	if (!real_iterate)
		*(void **)&real_iterate = dlsym(RTLD_NEXT, "dl_iterate_phdr");
	return __asan_init ? real_iterate(visit_others, &visit) : real_iterate(visitor, data);
}
