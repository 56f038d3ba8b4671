/* SPDX-License-Identifier: Apache-2.0 */
#include "arch/arch.h"

#include <arm_neon.h>
#include <string.h>

/* For loops in memcpy() and its relatives: without it the compiler may recognise the loop and call the very function
 * that it is in. */
#define AS_WRITTEN __asm__ volatile("")

#define LINE 64 /* bytes handled at a time */

static void move_up(char *to, const char *from, size_t n)
{
	for (; n >= LINE; n -= LINE) {
		uint8x16x4_t line = vld1q_u8_x4((const uint8_t *)(from + n - LINE));

		vst1q_u8_x4((uint8_t *)(to + n - LINE), line);
		AS_WRITTEN;
	}
	while (n--) {
		to[n] = from[n];
		AS_WRITTEN;
	}
}

static void move_down(char *to, const char *from, size_t n)
{
	for (; n >= LINE; n -= LINE, to += LINE, from += LINE) {
		vst1q_u8_x4((uint8_t *)to, vld1q_u8_x4((const uint8_t *)from));
		AS_WRITTEN;
	}
	for (size_t i = 0; i < n; i++) {
		to[i] = from[i];
		AS_WRITTEN;
	}
}

void *memcpy(void *restrict to, const void *restrict from, size_t n)
{
	move_down(to, from, n);
	return to;
}

void *memmove(void *to, const void *from, size_t n)
{
	if ((uintptr_t)to - (uintptr_t)from < n)
		move_up(to, from, n);
	else
		move_down(to, from, n);
	return to;
}

void *memset(void *to, int byte, size_t n)
{
	const uint8x16_t all = vdupq_n_u8((uint8_t)byte);
	uint8_t *at = to;

	for (; n >= sizeof(all); n -= sizeof(all), at += sizeof(all)) {
		vst1q_u8(at, all);
		AS_WRITTEN;
	}
	for (size_t i = 0; i < n; i++) {
		at[i] = (uint8_t)byte;
		AS_WRITTEN;
	}
	return to;
}

int memcmp(const void *p, const void *q, size_t n)
{
	const unsigned char *a = p, *b = q;
	size_t at = 0;

	for (; n - at >= LINE; at += LINE) {
		uint8x16x4_t x = vld1q_u8_x4(a + at), y = vld1q_u8_x4(b + at);
		uint8x16_t differs = vorrq_u8(vorrq_u8(veorq_u8(x.val[0], y.val[0]), veorq_u8(x.val[1], y.val[1])),
					      vorrq_u8(veorq_u8(x.val[2], y.val[2]), veorq_u8(x.val[3], y.val[3])));

		if (vmaxvq_u8(differs))
			break;
	}
	for (; at < n; at++)
		if (a[at] != b[at])
			return a[at] - b[at];
	return 0;
}
