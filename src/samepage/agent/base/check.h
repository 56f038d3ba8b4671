/* SPDX-License-Identifier: Apache-2.0 */
/* Self-checks for a build with -Ddebug_checks=true. In any other build they are empty. */
#ifndef SAMEPAGE_BASE_CHECK_H
#define SAMEPAGE_BASE_CHECK_H

#ifdef SAMEPAGE_CHECK
_Noreturn void check_failed(const char *line);
#define VM_BUG_LINE_(file, line, what) "samepage: " file ":" #line ": " what "\n"
#define VM_BUG_LINE(file, line, what) VM_BUG_LINE_(file, line, what)
#define VM_BUG_ON(wrong)                                                                                               \
	do {                                                                                                           \
		if (wrong)                                                                                             \
			check_failed(VM_BUG_LINE(__FILE__, __LINE__, #wrong));                                         \
	} while (0)
/* Called before the lock is released: checks areas and planes against each other and against the kernel. */
void check_books(void);
#else
#define VM_BUG_ON(wrong) ((void)sizeof(!(wrong)))
static inline void check_books(void)
{
}
#endif

#endif
