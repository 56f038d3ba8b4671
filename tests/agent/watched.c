/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Has libc's munmap and madvise say what is unmapped or discarded, as MPI libraries do: by a jump over their first bytes, or
 * by UCX's own library. Prints what was unmapped without a word.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <malloc.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MIB (1UL << 20)
#define BLOCKS 64

static struct {
	uintptr_t start, end;
} heard[4096];
static int nr_heard;

static void hear(void *p, size_t len)
{
	if (nr_heard < 4096) {
		heard[nr_heard].start = (uintptr_t)p;
		heard[nr_heard++].end = (uintptr_t)p + len;
	}
}

static bool was_heard(const char *p, size_t len)
{
	for (int i = 0; i < nr_heard; i++)
		if (heard[i].start <= (uintptr_t)p && (uintptr_t)p + len <= heard[i].end)
			return true;
	return false;
}

/* ---- by hand ---- */

static int own_munmap(void *p, size_t len)
{
	hear(p, len);
	free(malloc(3 * MIB)); /* as a listener may */
	return (int)syscall(SYS_munmap, p, len);
}

static int own_madvise(void *p, size_t len, int advice)
{
	hear(p, len);
	return (int)syscall(SYS_madvise, p, len, advice);
}

static void put_jump(const char *name, void *to)
{
	void *libc = dlopen("libc.so.6", RTLD_NOW | RTLD_NOLOAD);
	unsigned char *code = dlsym(libc, name), jump[13] = {0x49, 0xbb, [10] = 0x41, 0xff, 0xe3}; /* mov r11; jmp r11 */
	void *page = (void *)((uintptr_t)code & -4096UL);

	memcpy(jump + 2, &to, 8);
	mprotect(page, 8192, PROT_READ | PROT_WRITE | PROT_EXEC);
	memcpy(code, jump, sizeof(jump));
	mprotect(page, 8192, PROT_READ | PROT_EXEC);
}

/* ---- by UCX ---- */

typedef struct {
	void *address;
	size_t size;
} unmapped; /* in ucm/api/ucm.h, a part of ucm_event_t */

static void ucx_event(int type, const unmapped *event, void *nothing)
{
	(void)type, (void)nothing;
	hear(event->address, event->size);
}

static bool by_ucx(void)
{
	int (*set)(int, int, void (*)(int, const unmapped *, void *), void *);
	void *ucm;

	dlopen("libucs.so.0", RTLD_NOW | RTLD_GLOBAL);
	ucm = dlopen("libucm.so.0", RTLD_NOW | RTLD_GLOBAL);
	*(void **)&set = ucm ? dlsym(ucm, "ucm_set_event_handler") : NULL;
	return set && !set(1 << 17 /* UCM_EVENT_VM_UNMAPPED */, 1000, ucx_event, NULL);
}

/* ---- what a program does ---- */

static void *filled(void *p, size_t len)
{
	for (size_t i = 0; i < len / 8; i++)
		((uint64_t *)p)[i] = i * 0x9E3779B97F4A7C15;
	return p;
}

static bool holds(const void *p, size_t len)
{
	for (size_t i = 0; i < len / 8; i++)
		if (((const uint64_t *)p)[i] != i * 0x9E3779B97F4A7C15)
			return false;
	return true;
}

static void *map(size_t len)
{
	return mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

static void check(const char *what, bool well)
{
	if (!well)
		printf("%s\n", what);
}

int main(int argc, char **argv)
{
	char *early = filled(malloc(8 * MIB), 8 * MIB), *resized = filled(malloc(4 * MIB), 4 * MIB), *small, *large, *mapped, *gone;
	static char *many[BLOCKS];
	unsigned char page;

	usleep(argc > 2 ? 1000000 : 0); /* meanwhile they are merged */
	if (argv[1][0] == 'u') {
		if (!by_ucx())
			return 2;
	} else {
		put_jump("munmap", own_munmap);
		put_jump("madvise", own_madvise);
	}
	for (int i = 0; i < BLOCKS; i++)
		many[i] = filled(malloc(2 * MIB), 2 * MIB);
	small = filled(malloc(600 << 10), 600 << 10);
	large = filled(malloc(64 * MIB), 64 * MIB);
	mapped = filled(map(8 * MIB), 8 * MIB);
	gone = filled(map(8 * MIB), 8 * MIB);
	check("early changed", holds(early, 8 * MIB));
	resized = realloc(resized, 6 * MIB);
	check("resized changed", holds(resized, 4 * MIB));
	free(small);
	free(large);
	free(early);
	munmap(mapped, 8 * MIB);
	madvise(gone, 8 * MIB, MADV_DONTNEED);
	check("gone is there", !gone[5 * MIB]);
	check("small", was_heard(small + 4096, 500 << 10));
	check("large", was_heard(large + 4096, 63 * MIB));
	check("early", was_heard(early + 4096, 7 * MIB));
	check("mapped", was_heard(mapped, 8 * MIB));
	check("gone", was_heard(gone, 8 * MIB));
	for (int i = 0; i < BLOCKS; i++)
		free(many[i]);
	malloc_trim(0);
	for (int i = 0; i < BLOCKS; i++)
		if (mincore((void *)((uintptr_t)many[i] & -4096UL), 4096, &page) && errno == ENOMEM)
			check("one of many", was_heard(many[i] + 4096, MIB));
	return 0;
}
