/* SPDX-License-Identifier: Apache-2.0 */
/* Compares the functions of system.c, which the build has renamed to own_..., with libc's, on random arguments. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void *own_memcpy(void *to, const void *from, size_t n);
void *own_memmove(void *to, const void *from, size_t n);
void *own_memset(void *to, int byte, size_t n);
int own_memcmp(const void *a, const void *b, size_t n);
void *own_memchr(const void *p, int c, size_t n);
size_t own_strlen(const char *s);
char *own_stpcpy(char *to, const char *from);
char *own_strcpy(char *to, const char *from);
int own_strncmp(const char *a, const char *b, size_t n);
int own_strcmp(const char *a, const char *b);
char *own_strchrnul(const char *s, int c);
char *own_strchr(const char *s, int c);
char *own_strrchr(const char *s, int c);
char *own_strstr(const char *s, const char *what);
char *own_strsep(char **rest, const char *stops);
unsigned long own_strtoul(const char *s, char **end, int base);

_Bool descriptors_are_ours(void);

/* What system.c asks before it reads or closes. */
_Bool descriptors_are_ours(void)
{
	return 1;
}

static int sign(int n)
{
	return (n > 0) - (n < 0);
}

static void check(int right, const char *what)
{
	if (right)
		return;
	printf("%s differs\n", what);
	exit(1);
}

static void memory(void)
{
	static char a[9000], b[9000], from[9000];
	size_t n = (size_t)rand() % (rand() % 8 ? 300 : 8192), x = (size_t)rand() % 400, y = (size_t)rand() % 400;

	for (size_t i = 0; i < sizeof(from); i += 1 + (size_t)rand() % 64)
		from[i] = (char)rand();
	memcpy(a, from, sizeof(a));
	memcpy(b, from, sizeof(b));
	check(own_memmove(a + x, a + y, n) == a + x && memmove(b + x, b + y, n) && !memcmp(a, b, sizeof(a)), "memmove");
	check(own_memcpy(a + x, from + y, n) == a + x && memcpy(b + x, from + y, n) && !memcmp(a, b, sizeof(a)),
	      "memcpy");
	check(own_memset(a + y, (int)x, n) == a + y && memset(b + y, (int)x, n) && !memcmp(a, b, sizeof(a)), "memset");
	for (int i = 0; i < 3; i++) {
		check(sign(own_memcmp(a + x, b + x, n)) == sign(memcmp(a + x, b + x, n)), "memcmp");
		b[x + (size_t)rand() % (n + 1)] ^= (char)(rand() % 2 << rand() % 8);
	}
	check(own_memchr(a + x, 7, n) == memchr(a + x, 7, n), "memchr");
}

static void text(void)
{
	char a[40], b[40], stops[3] = {(char)('a' + rand() % 4), (char)(rand() % 2 ? 'c' : 0), 0}, *p, *q;
	char mine[40], theirs[40];
	size_t n = (size_t)rand() % 39, m = (size_t)rand() % 4, k = (size_t)rand() % 40;
	int c = rand() % 8 ? 'a' + rand() % 4 : 0;

	for (size_t i = 0; i < n; i++)
		a[i] = (char)('a' + rand() % 3);
	a[n] = 0;
	memcpy(b, a, sizeof(b));
	if (rand() % 2)
		b[(size_t)rand() % (n + 1)] = 0;
	check(own_strlen(a) == n, "strlen");
	check(own_stpcpy(mine, a) == mine + n && !strcmp(mine, a), "stpcpy");
	check(own_strcpy(mine, b) == mine && !strcmp(mine, b), "strcpy");
	check(sign(own_strcmp(a, b)) == sign(strcmp(a, b)), "strcmp");
	check(sign(own_strncmp(a, b, k)) == sign(strncmp(a, b, k)), "strncmp");
	check(own_strchrnul(a, c) == strchrnul(a, c), "strchrnul");
	check(own_strchr(a, c) == strchr(a, c), "strchr");
	check(own_strrchr(a, c) == strrchr(a, c), "strrchr");
	b[m] = 0;
	check(own_strstr(a, b) == strstr(a, b), "strstr");
	memcpy(mine, a, sizeof(a));
	memcpy(theirs, a, sizeof(a));
	p = mine;
	q = theirs;
	check(own_strsep(&p, stops) - mine == strsep(&q, stops) - theirs && !p == !q &&
		      (!p || p - mine == q - theirs) && !memcmp(mine, theirs, n + 1),
	      "strsep");
	snprintf(a, sizeof(a), "%*lu%s", rand() % 24, ((unsigned long)rand() << 33) + (unsigned long)rand(), "x");
	check(own_strtoul(a, &p, 10) == strtoul(a, &q, 10) && p == q, "strtoul");
}

int main(void)
{
	char *end;

	for (int i = 0; i < 5000; i++) {
		memory();
		text();
	}
	check(own_strtoul("99999999999999999999999 ", &end, 10) == ~0UL && *end == ' ', "strtoul");
	check(own_strstr("abc", "") != NULL && own_strrchr("", 0) != NULL, "the empty string");
	puts("the same");
	return 0;
}
