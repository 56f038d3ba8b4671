/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An ordered set of areas that do not overlap: a skip list. Its nodes lie in one mapping of our own and refer to each
 * other by number, so that a larger or smaller mapping can replace it. A node of height h is on the lists 0 to h - 1; a
 * quarter of the nodes on one list are also on the next. The height follows from the scrambled number of the node:
 * whichever nodes remain in use, a quarter of them still reach one list higher.
 *
 * An insertion takes one node. Before an operation changes anything, area_set_reserve() makes room for as many nodes as
 * it may need at worst.
 */
#include "base/area.h"
#include "base/check.h"
#include "base/descriptors.h"
#include "base/real.h"

#include <sys/mman.h>

#define LEVELS 10		  /* good for 4^10 areas; vm.max_map_count is usually 65,530 */
#define FIRST_CAPACITY (1U << 14) /* 1 MiB; its pages are touched only as they are needed */
#define LEAST_CAPACITY (1U << 8)

struct area_node {
	struct area area;
	uint32_t link[LEVELS]; /* the next node on each list; 0: none. [0] of an unused node: the next unused one */
};

static int height(uint32_t i)
{
	i *= 0x9e3779b9;
	i ^= i >> 15;
	i *= 0x85ebca6b;
	i ^= i >> 13;
	return 1 + __builtin_ctz(i | 1U << 2 * (LEVELS - 1)) / 2;
}

/* Finds, on each list, the last node that ends at or before `addr`; 0, the head, if there is none. */
static void find(const struct area_set *s, uintptr_t addr, uint32_t last[LEVELS])
{
	uint32_t at = 0, next;

	for (int level = LEVELS; level-- > 0; last[level] = at)
		while ((next = s->node[at].link[level]) && s->node[next].area.end <= addr)
			at = next;
}

struct area *area_set_next(struct area_set *s, uintptr_t addr)
{
	uint32_t last[LEVELS], i;
	const struct area *hint;

	if (!s->nr)
		return NULL;
	/* Mostly it is the area of the last call, or the one after it. */
	hint = &s->node[s->hint].area;
	i = hint->end <= addr ? s->node[s->hint].link[0] : hint->start <= addr ? s->hint : 0;
	if (!i || s->node[i].area.end <= addr) {
		find(s, addr, last);
		i = s->node[last[0]].link[0];
	}
	if (!i)
		return NULL;
	s->hint = i;
	return &s->node[i].area;
}

/* Moves the set to a mapping for `capacity` nodes. */
static bool resize(struct area_set *s, uint32_t capacity)
{
	size_t len = capacity * sizeof(struct area_node);
	uint32_t last[LEVELS] = {0}, n = 1;
	struct area_node *node = real.mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (node == MAP_FAILED)
		return false;
	real.madvise(node, len, MADV_NOHUGEPAGE);
	for (uint32_t i = s->nr ? s->node[0].link[0] : 0; i; i = s->node[i].link[0], n++) {
		node[n].area = s->node[i].area;
		for (int level = 0; level < height(n); level++) {
			node[last[level]].link[level] = n;
			last[level] = n;
		}
	}
	VM_BUG_ON(n != s->nr + 1);
	if (s->node)
		real.munmap(s->node, s->capacity * sizeof(struct area_node));
	s->node = node;
	s->capacity = capacity;
	s->fresh = n;
	s->unused = s->hint = 0;
	return true;
}

int area_set_reserve(struct area_set *s, size_t more)
{
	uint64_t want = (uint64_t)s->nr + more + 1, capacity = s->node ? s->capacity : FIRST_CAPACITY;

	s->reserved = more;
	/* Grow earlier than necessary: the last eighth is kept for when no memory can be had. */
	while (want > capacity - capacity / 8)
		capacity *= 2;
	if (s->node && capacity == s->capacity)
		return 0;
	/* The agent's thread maps nothing (window.c). The next thread of the program's that changes an area makes room. */
	if (on_agent_thread())
		return want <= s->capacity ? 0 : -ENOMEM;
	for (; capacity >= LEAST_CAPACITY && capacity >= want && capacity > s->capacity; capacity /= 2)
		if (capacity <= UINT32_MAX / 2 && resize(s, (uint32_t)capacity))
			return 0;
	return want <= s->capacity ? 0 : -ENOMEM;
}

void area_set_trim(struct area_set *s)
{
	/* At most `fresh` nodes were ever touched. */
	if (s->fresh > FIRST_CAPACITY / 4 && s->nr < s->fresh / 8)
		resize(s, s->capacity > 2 * FIRST_CAPACITY ? s->capacity / 2 : s->capacity);
}

struct area *area_set_insert(struct area_set *s, struct area a)
{
	uint32_t last[LEVELS], i = s->unused, next;

	VM_BUG_ON(!s->reserved);
	s->reserved--;
	if (i)
		s->unused = s->node[i].link[0];
	else
		i = s->fresh++;
	VM_BUG_ON(!i || i >= s->capacity);
	find(s, a.start, last);
	next = s->node[last[0]].link[0];
	VM_BUG_ON(a.start >= a.end || (next && s->node[next].area.start < a.end));
	s->node[i].area = a;
	for (int level = 0; level < height(i); level++) {
		s->node[i].link[level] = s->node[last[level]].link[level];
		s->node[last[level]].link[level] = i;
	}
	s->nr++;
	return &s->node[i].area;
}

void area_set_delete(struct area_set *s, struct area *a)
{
	uint32_t last[LEVELS], i = (uint32_t)((struct area_node *)a - s->node);

	find(s, a->start, last);
	for (int level = 0; level < height(i); level++) {
		VM_BUG_ON(s->node[last[level]].link[level] != i);
		s->node[last[level]].link[level] = s->node[i].link[level];
	}
	s->node[i].link[0] = s->unused;
	s->unused = i;
	s->nr--;
	s->hint = last[0];
}
