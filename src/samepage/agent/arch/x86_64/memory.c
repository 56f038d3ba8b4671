/* SPDX-License-Identifier: Apache-2.0 */
#include "arch/arch.h"

#include <immintrin.h>
#include <string.h>

/* For loops in memcpy() and its relatives: without it the compiler may recognise the loop and call the very function
 * that it is in. */
#define AS_WRITTEN __asm__ volatile("")

void *memcpy(void *restrict to, const void *restrict from, size_t n)
{
	void *ret = to;

	__asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
	return ret;
}

/* For overlapping ranges moved upwards: `rep movsb` backwards goes byte by byte. */
static void move_up(char *to, const char *from, size_t n)
{
	for (; n >= 64; n -= 64) {
		__m128i v[4];

		for (int i = 0; i < 4; i++)
			v[i] = _mm_loadu_si128((const __m128i *)(from + n - 64) + i);
		for (int i = 0; i < 4; i++)
			_mm_storeu_si128((__m128i *)(to + n - 64) + i, v[i]);
		AS_WRITTEN;
	}
	while (n--) {
		to[n] = from[n];
		AS_WRITTEN;
	}
}

/* For overlapping ranges moved downwards: if they are close together, the instruction is slow in either direction. */
static void move_down(char *to, const char *from, size_t n)
{
	for (; n >= 64; n -= 64, to += 64, from += 64) {
		__m128i v[4];

		for (int i = 0; i < 4; i++)
			v[i] = _mm_loadu_si128((const __m128i *)from + i);
		for (int i = 0; i < 4; i++)
			_mm_storeu_si128((__m128i *)to + i, v[i]);
		AS_WRITTEN;
	}
	for (size_t i = 0; i < n; i++) {
		to[i] = from[i];
		AS_WRITTEN;
	}
}

void *memmove(void *to, const void *from, size_t n)
{
	if ((uintptr_t)to - (uintptr_t)from < n)
		move_up(to, from, n);
	else if ((uintptr_t)from - (uintptr_t)to < n)
		move_down(to, from, n);
	else
		memcpy(to, from, n);
	return to;
}

void *memset(void *to, int byte, size_t n)
{
	void *at = to;

	__asm__ volatile("rep stosb" : "+D"(at), "+c"(n) : "a"(byte) : "memory");
	return to;
}

/* How many bytes at the start are certainly equal. Pages are compared one after another by these. That is as fast as
 * libc's memcmp(), but for data that comes from memory only because the next lines are prefetched. */
__attribute__((target("avx2"))) static size_t equal_avx2(const char *a, const char *b, size_t n)
{
	size_t at = 0;

	for (; n - at >= 128; at += 128) {
		const __m256i *p = (const __m256i *)(a + at), *q = (const __m256i *)(b + at);
		__m256i differs = _mm256_setzero_si256();

		for (size_t line = at + 1024; line < at + 1152; line += 64) {
			__builtin_prefetch(a + line);
			__builtin_prefetch(b + line);
		}
#pragma GCC unroll 4
		for (int i = 0; i < 4; i++)
			differs = _mm256_or_si256(
				differs, _mm256_xor_si256(_mm256_loadu_si256(p + i), _mm256_loadu_si256(q + i)));
		if (!_mm256_testz_si256(differs, differs))
			break;
	}
	return at;
}

static size_t equal_sse2(const char *a, const char *b, size_t n)
{
	size_t at = 0;

	for (; n - at >= 16; at += 16)
		if (_mm_movemask_epi8(_mm_cmpeq_epi8(_mm_loadu_si128((const __m128i *)(a + at)),
						     _mm_loadu_si128((const __m128i *)(b + at)))) != 0xffff)
			break;
	return at;
}

int memcmp(const void *p, const void *q, size_t n)
{
	const unsigned char *a = p, *b = q;
	size_t at = __builtin_cpu_supports("avx2") ? equal_avx2(p, q, n) : equal_sse2(p, q, n);

	for (; at < n; at++)
		if (a[at] != b[at])
			return a[at] - b[at];
	return 0;
}
