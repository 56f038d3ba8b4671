/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Large arrays of numpy's, in a process in which the agent was not preloaded (samepage.attach()). There no call of the program's
 * passes a wrapper. But numpy asks for the memory of each array here, and gives it back here (NEP 49, numpy 1.22), and nobody else
 * has any business unmapping or discarding it meanwhile. So the agent knows how long it lives.
 *
 * All blocks that are not large, and all that there were before, are those of the handler that numpy had `before`.
 */
#include "hooks/hooks.h"

#include <string.h>
#include <sys/mman.h>

#define HUGE_FROM (4UL << 20) /* numpy itself advises as much of its own memory */

/* PyDataMem_Handler, version 1. */
struct array_handler {
	char name[127];
	uint8_t version;
	void *ctx; /* of ours: `struct arrays` */
	void *(*malloc)(void *ctx, size_t size);
	void *(*calloc)(void *ctx, size_t n, size_t size);
	void *(*realloc)(void *ctx, void *p, size_t size);
	void (*free)(void *ctx, void *p, size_t size);
};

struct arrays {
	struct array_handler ours;
	const struct array_handler *before;
	bool huge;
};

static void *advised(const struct arrays *a, void *p, size_t size)
{
	if (p && a->huge && size >= HUGE_FROM)
		sp_madvise(p, PAGE_ALIGN_UP(size), MADV_HUGEPAGE);
	return p;
}

static void *array_malloc(void *ctx, size_t size)
{
	const struct arrays *a = ctx;
	void *p = advised(a, large_alloc(size, false), size);

	return p ? p : a->before->malloc(a->before->ctx, size);
}

static void *array_calloc(void *ctx, size_t n, size_t size)
{
	const struct arrays *a = ctx;
	size_t bytes;
	void *p = NULL;

	if (!__builtin_mul_overflow(n, size, &bytes))
		p = advised(a, large_alloc(bytes, true), bytes);
	return p ? p : a->before->calloc(a->before->ctx, n, size);
}

static void *array_realloc(void *ctx, void *p, size_t size)
{
	const struct arrays *a = ctx;
	size_t length = p ? large_length(p) : 0;
	void *q;

	if (!length)
		return a->before->realloc(a->before->ctx, p, size);
	q = large_resize(p, size);
	if (q)
		return advised(a, q, size);
	q = a->before->malloc(a->before->ctx, size);
	if (q) {
		memcpy(q, p, length < size ? length : size);
		large_free(p);
	}
	return q;
}

static void array_free(void *ctx, void *p, size_t size)
{
	const struct arrays *a = ctx;

	if (!p || !large_free(p))
		a->before->free(a->before->ctx, p, size);
}

SP_EXPORT void samepage_serve(size_t bytes)
{
	need_next();
	mmap_note_memory();
	if (!alloc_enabled())
		alloc_enable(bytes);
}

/* Returns a handler for arrays, which is there as long as the process; NULL: there is no memory, or `before` is of a version that we
 * do not know. */
SP_EXPORT const struct array_handler *samepage_array_handler(const struct array_handler *before, int huge)
{
	struct arrays *a;

	need_next();
	if (before->version != 1 || !(a = next.calloc(1, sizeof(*a))))
		return NULL;
	*a = (struct arrays){
		.ours = {"samepage", 1, a, array_malloc, array_calloc, array_realloc, array_free},
		.before = before,
		.huge = huge,
	};
	return &a->ours;
}
